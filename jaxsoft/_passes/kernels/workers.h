// The threads of XLA for the tasks of a call, and the memory that they write to.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>

#include "rows.h"
#include "xla/ffi/api/ffi.h"

namespace jaxsoft {
namespace {

namespace ffi = xla::ffi;

// Tasks that any thread takes from. The one that called takes part, so that all are
// done also where no other thread ever comes; one that comes late finds nothing left.
struct Queue {
  const int64_t tasks;
  const Workers::Task task;
  void* const context;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
  std::mutex mutex;
  std::condition_variable all_done;

  Queue(int64_t tasks, Workers::Task task, void* context)
      : tasks(tasks), task(task), context(context) {}

  void work() {
    for (int64_t i = next++; i < tasks; i = next++) {
      task(context, i);
      if (++done < tasks) continue;
      std::lock_guard<std::mutex> lock(mutex);
      all_done.notify_all();
    }
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    all_done.wait(lock, [this] { return done == tasks; });
  }
};

class PoolWorkers final : public Workers {
 public:
  explicit PoolWorkers(ffi::ThreadPool pool) : pool_(pool) {}

  void run(int64_t tasks, Task task, void* context) override {
    int64_t threads = tasks > 1 ? std::min(tasks, pool_.num_threads()) : 1;
    if (threads <= 1) {
      for (int64_t i = 0; i < tasks; ++i) task(context, i);
      return;
    }
    auto queue = std::make_shared<Queue>(tasks, task, context);
    for (int64_t i = 1; i < threads; ++i) pool_.Schedule([queue] { queue->work(); });
    queue->work();
    queue->wait();
  }

 private:
  ffi::ThreadPool pool_;
};

// Page faults are most of the time of a fresh large result: huge pages make them few.
void expect_large_writes(void* data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 1 << 21;
  if (bytes < 2 * kHugePage) return;
  uintptr_t begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
  begin = (begin + kHugePage - 1) / kHugePage * kHugePage;
  end = end / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace
}  // namespace jaxsoft
