// Copies between a device and the host, which may still be under way when the host goes on.
#pragma once

#include <cstring>
#include <vector>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_local_scalar_dense_native.h>

#include "memory.h"

namespace pretend {

// Copies that a card would still be making, in the order of the stream. On the way to the host, `host` shows NaN (-1 for
// whole numbers) until somebody waits, and then becomes `values`; on the way to the device it must still be `values` then.
struct Late {
  Tensor host, values;
  bool to_host;
};
auto& late = *new std::vector<Late>;
std::recursive_mutex late_lock;

Tensor snapshot(const Tensor& tensor) { return tensor.clone(at::MemoryFormat::Contiguous); }

void poison(const Tensor& host) {
  if (host.scalar_type() != at::kBool) std::memset(host.mutable_data_ptr(), 0xFF, host.nbytes());
}

void arrive(const Late& copy) {
  at::AutoDispatchBelowADInplaceOrView below;  // nobody asked for this copy, least of all autograd
  if (copy.to_host) {
    copy.host.copy_(copy.values);
  } else {
    const auto now = snapshot(copy.host);
    TORCH_CHECK(std::memcmp(now.data_ptr(), copy.values.data_ptr(), now.nbytes()) == 0,
                "pinned memory was changed before the non-blocking copy that reads it was waited for");
  }
}

void wait() {
  std::lock_guard<std::recursive_mutex> held(late_lock);
  const auto arrived = std::exchange(late, {});
  for (const auto& copy : arrived) arrive(copy);
}

// A later copy on the device's stream finds the values of an earlier one, although the host does not see them yet.
void copy_late(const Tensor& to, const Tensor& from) {
  std::lock_guard<std::recursive_mutex> held(late_lock);
  const bool to_host = !to.is_cuda();
  const auto& host = to_host ? to : from;
  auto same = [&](const Late& copy) { return copy.host.storage().data() == host.storage().data(); };
  for (const auto& copy : late)
    if (same(copy)) arrive(copy);
  if (to_host) {
    // What was to be read here has been read, and may change.
    std::erase_if(late, [&](const Late& copy) { return same(copy) && !copy.to_host; });
    late.push_back({to, snapshot(lent(from)), true});
  } else {
    lent(to).copy_(from);
    late.push_back({from, snapshot(from), false});
  }
  for (const auto& copy : late)
    if (copy.to_host && same(copy)) poison(copy.host);
}

Tensor& copy_(Tensor& self, const Tensor& from, bool non_blocking) {
  const auto& host = self.is_cuda() ? from : self;
  // Memory that is not pinned is copied through a buffer, and nobody sees it half done.
  const bool crosses = self.is_cuda() != from.is_cuda();
  if (crosses && non_blocking && is_pinned(host.storage().data()) && host.is_non_overlapping_and_dense()) {
    copy_late(self, from);
    return self;
  }
  if (crosses && !non_blocking) wait();
  as_host(self).copy_(as_host(from));
  return self;
}

at::Scalar item(const Tensor& self) {
  wait();
  return at::native::_local_scalar_dense_cpu(lent(self));
}

}  // namespace pretend
