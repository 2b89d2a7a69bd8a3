// Scratch memory that a thread keeps between calls: new pages cost more than the arithmetic of a small layer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <new>

namespace dsconv {

class NoMemory : public std::bad_alloc {
 public:
  explicit NoMemory(std::int64_t bytes) {
    std::snprintf(what_, sizeof what_, "the kernels need %lld more bytes of memory than there are: run smaller batches or images",
                  static_cast<long long>(bytes));
  }
  const char* what() const noexcept override { return what_; }

 private:
  char what_[128];
};

// Large memory is freed after use. Every user, identified by a type, has separate memory.
template <class User>
class Scratch {
 public:
  explicit Scratch(std::int64_t bytes) {
    if (bytes <= kept_.bytes) return;
    kept_.release();
    const std::int64_t whole = (bytes + 63) / 64 * 64;
    kept_.data = static_cast<std::byte*>(::operator new(whole, std::align_val_t{64}, std::nothrow));
    if (!kept_.data) throw NoMemory(whole);  // kept_ is 0 already
    kept_.bytes = whole;
  }
  ~Scratch() {
    if (kept_.bytes > kKeepAtMost) kept_.release();
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Returns space for the next `count` values.
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
