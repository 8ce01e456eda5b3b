// Loads of several neighbouring elements, 16 bytes an instruction where the elements reach that far.
#pragma once

namespace fa3 {

template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Vec {
  T value[kCount];
};

// `pointer` is aligned to alignof(Vec<T, kCount>); one element needs no alignment beyond its own.
template <int kCount, class T>
__device__ __forceinline__ Vec<T, kCount> load_global(const T* pointer) {
  return *reinterpret_cast<const Vec<T, kCount>*>(pointer);
}

}  // namespace fa3
