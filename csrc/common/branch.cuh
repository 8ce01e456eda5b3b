// Where code goes that hardly ever runs.
#pragma once

namespace fa3 {

// A condition that seldom holds. What depends on it is moved out of the way, so that what always runs lies side by side: a
// loop that leaps over code that it never runs has been up to 4 % slower (benchmarks/LOG.md, Forward 71).
__device__ __forceinline__ bool rarely(bool condition) { return __builtin_expect(condition, false); }

}  // namespace fa3
