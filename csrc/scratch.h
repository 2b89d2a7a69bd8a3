// Memory that a thread keeps from call to call, since new pages cost more than the arithmetic of a small layer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace dsconv {

// What is large is given back. Every user has its own, named by a type.
template <class User>
class Scratch {
 public:
  explicit Scratch(std::int64_t bytes) {
    if (bytes <= kept_.bytes) return;
    kept_.release();
    kept_.bytes = (bytes + 63) / 64 * 64;
    kept_.data = static_cast<std::byte*>(::operator new(kept_.bytes, std::align_val_t{64}));
  }
  ~Scratch() {
    if (kept_.bytes > kKeepAtMost) kept_.release();
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // The next so many values.
  template <class T>
  T* take(std::int64_t count) {
    T* values = reinterpret_cast<T*>(kept_.data + taken_);
    taken_ += size<T>(count);
    return values;
  }
  template <class T>
  static std::int64_t size(std::int64_t count) {
    return (count * static_cast<std::int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  static constexpr std::int64_t kKeepAtMost = 32 << 20;
  struct Kept {
    std::byte* data = nullptr;
    std::int64_t bytes = 0;
    void release() {
      ::operator delete(data, std::align_val_t{64});
      data = nullptr, bytes = 0;
    }
    ~Kept() { release(); }
  };
  static thread_local Kept kept_;
  std::int64_t taken_ = 0;
};
template <class User>
thread_local typename Scratch<User>::Kept Scratch<User>::kept_;

}  // namespace dsconv
