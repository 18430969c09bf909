#pragma once
#include <cstdint>
#include <memory>

namespace gk {

// To be called before the first touch of freshly allocated memory.
void prefer_huge_pages(void* data, int64_t bytes);

// An uninitialised array of trivial values.
template <typename T> class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) : values(new T[size_t(count)]) {
    if (count * int64_t(sizeof(T)) >= kMinHugePageBytes) prefer_huge_pages(values.get(), count * int64_t(sizeof(T)));
  }
  T* data() { return values.get(); }
  const T* data() const { return values.get(); }
  T& operator[](int64_t i) { return values[size_t(i)]; }
  const T& operator[](int64_t i) const { return values[size_t(i)]; }

 private:
  static constexpr int64_t kMinHugePageBytes = 4 << 20;
  std::unique_ptr<T[]> values;
};

}  // namespace gk
