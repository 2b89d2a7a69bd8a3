#include "parallel.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace dsconv {
namespace {

std::atomic<int> wanted{1};

// Threads that wait for a job and take parts of it one by one; the caller takes part. One job at a time: a caller that
// finds the pool busy does its job alone.
class Pool {
 public:
  explicit Pool(int threads) : process_(getpid()) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
  }

  ~Pool() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  int threads() const { return static_cast<int>(workers_.size()) + 1; }
  bool of_this_process() const { return process_ == getpid(); }

  void run(std::int64_t begin, std::int64_t end, Range function, void* context) {
    {
      const std::lock_guard lock(mutex_);
      function_ = function, context_ = context, end_ = end;
      next_.store(begin, std::memory_order_relaxed);
      running_ = static_cast<int>(workers_.size());
      ++job_;
    }
    wake_.notify_all();
    take();
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void take() {
    for (std::int64_t i; (i = next_.fetch_add(1)) < end_;) function_(i, i + 1, context_);
  }

  void work() {
    std::int64_t seen = 0;
    std::unique_lock lock(mutex_);
    while (true) {
      wake_.wait(lock, [&] { return stop_ || job_ != seen; });
      if (stop_) return;
      seen = job_;
      lock.unlock();
      take();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  const pid_t process_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  bool stop_ = false;
  int running_ = 0;
  std::int64_t job_ = 0, end_ = 0;
  std::atomic<std::int64_t> next_{0};
  Range function_ = nullptr;
  void* context_ = nullptr;
};

}  // namespace

void pool_threads(int count) { wanted = std::max(1, count); }

void parallel_for_of_pool(std::int64_t begin, std::int64_t end, std::int64_t, Range function, void* context) {
  // Neither is destroyed when the process ends: another thread may be in here still.
  static std::mutex& busy = *new std::mutex;
  static std::unique_ptr<Pool>& pool = *new std::unique_ptr<Pool>;
  const std::unique_lock lock(busy, std::try_to_lock);
  if (!lock || wanted == 1) return function(begin, end, context);
  if (pool && !pool->of_this_process()) pool.release();  // a fork has the object, but not its threads
  if (!pool || pool->threads() != wanted) pool = std::make_unique<Pool>(wanted);
  pool->run(begin, end, function, context);
}

}  // namespace dsconv
