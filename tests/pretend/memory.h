// A device's memory: the host's, counted for each device, with an end. And pinned memory, which is known by its address.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <unordered_set>

#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

namespace pretend {

using at::Tensor;
using c10::Device, c10::DeviceIndex, c10::Storage;

constexpr int MOST = 8;
constexpr int64_t GRAIN = 512;  // CUDA's allocator hands out multiples of it

struct Ledger {
  int64_t live = 0, peak = 0, limit = 80'000'000'000;
};
Ledger ledgers[MOST];
std::mutex memory_lock;
thread_local DeviceIndex current = 0;

DeviceIndex device_count() {
  static const char* asked = std::getenv("PRETEND_DEVICES");
  return asked ? std::clamp(std::atoi(asked), 1, MOST) : 1;
}

void charge(DeviceIndex index, int64_t bytes) {
  std::lock_guard<std::mutex> held(memory_lock);
  auto& ledger = ledgers[index];
  TORCH_CHECK_WITH(OutOfMemoryError, ledger.live + bytes <= ledger.limit, "CUDA out of memory. Tried to allocate ",
                   bytes, " bytes. GPU ", int(index), " has a total capacity of ", ledger.limit, " bytes of which ",
                   ledger.limit - ledger.live, " are free. (It is a pretended one.)");
  ledger.live += bytes;
  ledger.peak = std::max(ledger.peak, ledger.live);
}

struct Block {
  DeviceIndex index;
  int64_t bytes;
  Storage host;
};

void release(void* context) {
  std::unique_ptr<Block> block(static_cast<Block*>(context));
  std::lock_guard<std::mutex> held(memory_lock);
  ledgers[block->index].live -= block->bytes;
}

Storage on_cpu(size_t bytes) {
  return Storage(Storage::use_byte_size_t(), bytes, c10::GetCPUAllocator(), /*resizable=*/true);
}

// Host memory becomes a device's: nothing is copied, but from now on it counts there.
c10::DataPtr adopted(Storage host, DeviceIndex index) {
  const int64_t bytes = (int64_t(host.nbytes()) + GRAIN - 1) / GRAIN * GRAIN;
  charge(index, bytes);
  void* data = host.mutable_data();
  return {data, new Block{index, bytes, std::move(host)}, &release, Device(at::kCUDA, index)};
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override { return adopted(on_cpu(bytes), current); }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
} device_allocator;
REGISTER_ALLOCATOR(at::kCUDA, &device_allocator)

// Never destroyed: tensors may go after what this library holds.
auto& pinned = *new std::unordered_set<const void*>;

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto* host = new Storage(on_cpu(bytes));
    std::lock_guard<std::mutex> held(memory_lock);
    pinned.insert(host->data());
    return {host->mutable_data(), host, &unpin, at::kCPU};
  }
  static void unpin(void* context) {
    std::unique_ptr<Storage> host(static_cast<Storage*>(context));
    std::lock_guard<std::mutex> held(memory_lock);
    pinned.erase(host->data());
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
} pinned_allocator;

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> held(memory_lock);
  return data != nullptr && pinned.count(data);
}

Tensor over(Storage storage, const Tensor& like, c10::DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  made._set_conj(like.is_conj());
  made._set_neg(like.is_neg());
  return made;
}

// A CPU tensor over a device's memory, which it keeps alive.
Tensor lent(const Tensor& own) {
  auto* kept = new Storage(own.storage());
  c10::DataPtr data(kept->mutable_data(), kept, [](void* s) { delete static_cast<Storage*>(s); }, at::kCPU);
  return over(Storage(Storage::use_byte_size_t(), kept->nbytes(), std::move(data), c10::GetCPUAllocator(), true), own,
              c10::DispatchKey::CPU);
}

Tensor as_host(const Tensor& tensor) { return tensor.is_cuda() ? lent(tensor) : tensor; }

}  // namespace pretend
