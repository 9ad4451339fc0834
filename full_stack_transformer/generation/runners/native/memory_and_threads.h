// Memory that is taken on demand, and threads that share pieces of work. Knows nothing of numbers and of models.

#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <list>
#include <memory>
#include <new>
#include <thread>
#include <vector>

namespace {

inline void pause() {  // between two looks at what another thread will write
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Value>
class Buffer {  // 64-byte aligned, not initialized, grows on demand
 public:
  explicit Buffer(size_t size = 0) { reserve(size); }
  Value* reserve(size_t size) {
    if (size > size_) {
      size_ = 0;  // should it fail, the next one tries again
      const size_t bytes = (size * sizeof(Value) + 63) / 64 * 64;
      data_.reset(static_cast<Value*>(std::aligned_alloc(64, bytes)));
      if (!data_) throw std::bad_alloc();
      size_ = size;
    }
    return data_.get();
  }
  Value* get() const { return data_.get(); }
  size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(void* pointer) const { std::free(pointer); }
  };
  std::unique_ptr<Value, Free> data_;
  size_t size_ = 0;
};

// Zeros, which take memory page by page when they are first written: 2 MB at once, where the system has such
// pages. That is a few tokens' keys and values, whose blocks are anywhere; small pages delay them by a tenth.
class ZeroPages {
 public:
  ZeroPages() = default;
  ZeroPages(const ZeroPages&) = delete;
  ZeroPages& operator=(const ZeroPages&) = delete;
#ifdef __SANITIZE_ADDRESS__  // which watches the ends of what the allocator gives
  ~ZeroPages() { std::free(data_); }
  void reserve(size_t size) {  // once
    data_ = static_cast<uint8_t*>(std::calloc(size, 1));
    if (!data_) throw std::bad_alloc();
  }
#else
  ~ZeroPages() {
    if (data_) munmap(data_, size_);
  }
  void reserve(size_t size) {  // once
    void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(data, size, MADV_HUGEPAGE);
#endif
    data_ = static_cast<uint8_t*>(data);
    size_ = size;
  }
#endif
  uint8_t* get() const { return data_; }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// Memory that stays until the end, piece after piece in huge pages. All weights are read in every step, which
// small pages delay by a tenth; so do those in which each piece would begin anew.
class HugePages {
 public:
  explicit HugePages(size_t chunk = size_t{32} << 20) : chunk_(chunk) {}
  uint8_t* take(size_t size) {
    size = (size + 63) / 64 * 64;
    if (size > size_left_) {
      size_left_ = (std::max(size, chunk_) + kPage - 1) / kPage * kPage;
      chunks_.emplace_back().reserve(size_left_ + kPage);
      const auto address = reinterpret_cast<uintptr_t>(chunks_.back().get());
      place_ = chunks_.back().get() + (kPage - address % kPage) % kPage;
#ifdef MADV_HUGEPAGE
      madvise(place_, size_left_, MADV_HUGEPAGE);
#endif
    }
    uint8_t* taken = place_;
    place_ += size;
    size_left_ -= size;
    return taken;
  }

 private:
  static constexpr size_t kPage = size_t{2} << 20;
  const size_t chunk_;
  std::list<ZeroPages> chunks_;
  uint8_t* place_ = nullptr;
  size_t size_left_ = 0;
};

// Threads that wait for the next piece of work by spinning for a while: a step has some eighty pieces of a
// few microseconds, and waking a sleeping thread takes fifty.
class Pool {
 public:
  explicit Pool(int num_threads) {
    for (int number = 1; number < num_threads; ++number) {
      threads_.emplace_back([this] { serve(); });
    }
  }

  ~Pool() {
    is_over_ = true;
    round_.fetch_add(1);
    round_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  // Calls work(0) … work(count - 1), each once, on all threads; throws std::bad_alloc where one of them has.
  void run(int count, const std::function<void(int)>& work) {
    if (count == 1 || threads_.empty()) {
      for (int item = 0; item < count; ++item) work(item);
      return;
    }
    work_ = &work;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    is_open_.store(true);
    round_.fetch_add(1);
    round_.notify_all();
    take();
    // Only those that have come in are waited for: on a busy machine a thread may not run for milliseconds.
    is_open_.store(false);
    for (int spins = 0; num_inside_.load() > 0; ++spins) {
      if (spins < 2000) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
    if (has_failed_.exchange(false)) throw std::bad_alloc();
  }

 private:
  void take() {
    try {
      for (int item; (item = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) (*work_)(item);
    } catch (const std::bad_alloc&) {
      has_failed_ = true;
    }
  }

  void serve() {
    uint32_t seen = 0;
    while (true) {
      for (int spins = 0; round_.load(std::memory_order_acquire) == seen && spins < 20000; ++spins) {
        pause();
      }
      round_.wait(seen, std::memory_order_acquire);
      seen = round_.load(std::memory_order_acquire);
      if (is_over_) return;
      // Come in first, look second: whoever finds it open is waited for.
      num_inside_.fetch_add(1);
      if (is_open_.load()) take();
      num_inside_.fetch_sub(1);
    }
  }

  std::vector<std::thread> threads_;
  const std::function<void(int)>* work_ = nullptr;
  int count_ = 0;
  std::atomic<int> next_{0}, num_inside_{0};
  std::atomic<bool> is_open_{false}, has_failed_{false};
  std::atomic<uint32_t> round_{0};
  std::atomic<bool> is_over_{false};
};

}  // namespace
