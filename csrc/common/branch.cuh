// Where code goes that hardly ever runs.
#pragma once

namespace fa3 {

// A condition that seldom holds. What depends on it is moved out of the way, so that what always runs lies side by side: a
// processor's caches hold 128 instructions and, behind these, a few thousand, and a loop that leaps over code that it never
// runs is slower by 4 % (benchmarks/LOG.md, Forward 71).
__device__ __forceinline__ bool rarely(bool condition) { return __builtin_expect(condition, false); }

}  // namespace fa3
