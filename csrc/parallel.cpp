#include "parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace dsconv {
namespace {

constexpr int kMostThreads = 1024;
std::atomic<int> wanted{1};

// Spin time of a waiting thread before it sleeps: the next step of a network arrives sooner, and waking a thread takes a
// considerable part of a step.
constexpr std::chrono::microseconds kLookout{500};

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until a condition holds or the time is over.
template <class Condition>
void look_out(Condition holds) {
  constexpr int kLooks = 64;  // iterations per reading of the clock
  const auto until = std::chrono::steady_clock::now() + kLookout;
  do {
    for (int i = 0; i < kLooks; ++i, pause())
      if (holds()) return;
  } while (std::chrono::steady_clock::now() < until);
}

// Thread pool: the workers and the caller take parts of a job one by one. One job runs at a time: a caller that finds the
// pool busy executes its job alone.
class Pool {
 public:
  explicit Pool(int threads) : threads_(threads), looks_out_(threads <= static_cast<int>(std::thread::hardware_concurrency())) {
    workers_.reserve(threads - 1);
    try {
      for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
    } catch (...) {  // the system refuses more threads: the existing ones do the work
    }
  }

  ~Pool() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  int threads() const { return threads_; }  // the requested number

  void run(std::int64_t begin, std::int64_t end, Range function, void* context) {
    bool asleep;
    {
      const std::lock_guard lock(mutex_);
      function_ = function, context_ = context, end_ = end;
      next_.store(begin, std::memory_order_relaxed);
      running_ = static_cast<int>(workers_.size());
      ++job_;  // publishes the job: workers read the other members now
      asleep = sleeping_ > 0;
    }
    if (asleep) wake_.notify_all();
    take();
    const auto done = [this] { return running_ == 0; };
    if (looks_out_) look_out(done);
    if (done()) return;
    std::unique_lock lock(mutex_);
    waiting_ = true;
    done_.wait(lock, done);
    waiting_ = false;
  }

 private:
  void take() {
    for (std::int64_t i; (i = next_.fetch_add(1)) < end_;) function_(i, i + 1, context_);
  }

  void work() {
    std::int64_t seen = 0;
    const auto called = [&] { return stop_ || job_ != seen; };
    while (true) {
      if (looks_out_) look_out(called);
      if (!called()) {
        std::unique_lock lock(mutex_);
        ++sleeping_;
        wake_.wait(lock, called);
        --sleeping_;
      }
      if (stop_) return;
      seen = job_;
      take();
      if (--running_ > 0) continue;
      const std::lock_guard lock(mutex_);
      if (waiting_) done_.notify_one();
    }
  }

  const int threads_;
  const bool looks_out_;  // there is a processor for each thread thread
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  int sleeping_ = 0;
  bool waiting_ = false;
  std::atomic<bool> stop_{false};
  std::atomic<int> running_{0};
  std::atomic<std::int64_t> job_{0}, next_{0};
  std::int64_t end_ = 0;
  Range function_ = nullptr;
  void* context_ = nullptr;
};

// The state of this process. It is never destroyed, since another thread may still use it at exit.
struct Own {
  std::mutex busy;
  std::unique_ptr<Pool> pool;
};
Own* own = new Own;

// The child of a fork has no threads, neither ours nor PyTorch's, and would wait for them forever; locks that another
// thread held stay locked. Therefore it starts with its own pool.
void begin_child() {
  own = new Own;
  if (parallel_for) parallel_for = parallel_for_of_pool;
}
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, begin_child);

}  // namespace

void pool_threads(int count) { wanted = std::clamp(count, 1, kMostThreads); }

void parallel_for_of_pool(std::int64_t begin, std::int64_t end, std::int64_t, Range function, void* context) {
  const std::unique_lock lock(own->busy, std::try_to_lock);
  const int threads = wanted;
  if (!lock || threads == 1) return function(begin, end, context);
  std::unique_ptr<Pool>& pool = own->pool;
  if (!pool || pool->threads() != threads) {
    pool.reset();
    pool = std::make_unique<Pool>(threads);
  }
  pool->run(begin, end, function, context);
}

}  // namespace dsconv
