// A pretended GPU: torch's CUDA dispatch key, filled with host memory and CPU kernels.
//
// Loaded before torch is imported, it makes `cuda:0` ... `cuda:7` real enough for autograd, autocast, optimizers,
// pipelines and groups of processes, and it is as strict as a card: tensors of several devices do not mix, memory ends
// at a limit, and what was copied without blocking is not there before somebody waits. It knows nothing of speed, of
// memory inside a kernel, or of several streams.

#include <vector>

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "copies.h"
#include "hooks.h"
#include "memory.h"

namespace pretend {

using c10::IValue;
using torch::jit::Stack;

// What may lie on the host beside tensors of a device, as on a card.
bool is_index(const std::string& name, size_t position) {
  const bool indexes = name == "aten::index" || name == "aten::index_put" || name == "aten::index_put_" ||
      name == "aten::_index_put_impl_" || name == "aten::_unsafe_index" || name == "aten::_unsafe_index_put";
  return indexes && position == 1;
}

template <typename F>
void each_tensor(const IValue& value, const F& visit) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) visit(value.toTensor());
  } else if (value.isList()) {
    for (const IValue& item : value.toListRef()) each_tensor(item, visit);
  }
}

// The device that an operator's arguments share.
Device shared_device(const c10::FunctionSchema& schema, c10::ArrayRef<IValue> arguments) {
  std::optional<Device> found;
  for (const auto& value : arguments)
    each_tensor(value, [&](const Tensor& t) { if (!found && t.is_cuda()) found = t.device(); });
  for (const auto& value : arguments)
    if (!found && value.isDevice() && value.toDevice().has_index()) found = value.toDevice();
  const Device device = found.value_or(Device(at::kCUDA, current));
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto* alias = schema.arguments()[i].alias_info();
    const bool written = alias && alias->isWrite();
    each_tensor(arguments[i], [&](const Tensor& t) {
      const bool free = t.is_cpu() && ((t.dim() == 0 && !written) || is_index(schema.name(), i));
      TORCH_CHECK(free || t.device() == device, "Expected all tensors to be on the same device, but found at least two "
                  "devices, ", device, " and ", t.device(), "! (when checking argument ", schema.arguments()[i].name(),
                  " of ", schema.name(), ")");
    });
  }
  return device;
}

struct Loan {
  Tensor own, host;
};

IValue to_host(const IValue& value, std::vector<Loan>& loans) {
  if (value.isTensor() && value.toTensor().defined() && value.toTensor().is_cuda()) {
    loans.push_back({value.toTensor(), lent(value.toTensor())});
    return loans.back().host;
  }
  if (value.isDevice() && value.toDevice().is_cuda()) return Device(at::kCPU);
  bool holds = false;
  if (value.isList()) each_tensor(value, [&](const Tensor&) { holds = true; });
  if (!holds) return value;
  c10::impl::GenericList hosts(value.toList().elementType());
  for (const IValue& item : value.toListRef()) hosts.push_back(to_host(item, loans));
  return hosts;
}

Tensor to_device(const Tensor& made, const std::vector<Loan>& loans, Device device, const std::string& name) {
  for (const auto& [own, host] : loans)
    if (made.is_same(host)) return own;
  for (const auto& [own, host] : loans)
    TORCH_CHECK(made.storage().data() != host.storage().data() || made.nbytes() == 0, name,
                " returns a view: give it a kernel of its own");
  auto data = adopted(made.storage(), device.index());
  Storage storage(Storage::use_byte_size_t(), made.storage().nbytes(), std::move(data), &device_allocator, true);
  return over(std::move(storage), made, c10::DispatchKey::CUDA);
}

IValue to_device(const IValue& value, const std::vector<Loan>& loans, Device device, const std::string& name) {
  if (value.isTensor()) return value.toTensor().defined() ? to_device(value.toTensor(), loans, device, name) : value;
  bool holds = false;
  if (value.isList()) each_tensor(value, [&](const Tensor&) { holds = true; });
  if (!holds) return value;
  c10::impl::GenericList made(value.toList().elementType());
  for (const IValue& item : value.toListRef()) made.push_back(to_device(item, loans, device, name));
  return made;
}

// `out=` may have been resized: its memory is another then, and the device's follows.
void follow(const Loan& loan) {
  if (loan.own.sizes() == loan.host.sizes() && loan.own.storage().data() == loan.host.storage().data()) return;
  loan.own.resize_(loan.host.sizes());
  lent(loan.own).copy_(loan.host);
}

// Every operator without a kernel below: check as CUDA would, and run the CPU's kernel on the same memory.
void on_device(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  TORCH_CHECK(op.hasComputedKernelForDispatchKey(c10::DispatchKey::CPU), schema.name(), ".", schema.overload_name(),
              " has no CPU kernel that the pretended device could use");
  const auto count = schema.arguments().size();
  const Device device = shared_device(schema, torch::jit::last(*stack, count));
  if (schema.name() == "aten::equal") wait();
  std::vector<Loan> loans;
  for (auto value = stack->end() - count; value != stack->end(); ++value) *value = to_host(*value, loans);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (const auto& loan : loans) follow(loan);
  for (auto value = stack->end() - schema.returns().size(); value != stack->end(); ++value)
    *value = to_device(*value, loans, device, schema.name());
}

using Dtype = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using Place = std::optional<Device>;

c10::DeviceGuard guard_of(Place device) { return c10::DeviceGuard(device.value_or(Device(at::kCUDA, current))); }

Tensor empty(at::IntArrayRef size, Dtype dtype, Layout, Place device, std::optional<bool> pin,
             std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  const auto guard = guard_of(device);
  return at::detail::empty_generic(size, &device_allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, Dtype dtype, Layout, Place device,
                     std::optional<bool> pin) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  const auto guard = guard_of(device);
  return at::detail::empty_strided_generic(size, stride, &device_allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

const Tensor& resize_(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  const auto guard = guard_of(self.device());
  return at::native::resize_(self, size, format);
}

int64_t attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                  std::optional<double>, bool) {
  return 0;  // the one that is made of other operators
}

void record_stream(Tensor&, at::Stream) {}

torch::CppFunction boxed() { return torch::CppFunction::makeFromBoxedFunction<&on_device>(); }

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(boxed()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("_local_scalar_dense", &item);
  m.impl("resize_", &resize_);
  m.impl("record_stream", &record_stream);
  m.impl("_fused_sdp_choice", &attention);
  // Made of other operators, they would ask for a kernel of CUDA's own further down.
  for (const auto* name : {"convolution", "convolution_backward", "mse_loss"}) m.impl(name, boxed());
  // Views are of the tensor itself, and torch's own kernels ask for no device.
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", static_cast<Tensor (*)(const Tensor&, at::IntArrayRef)>(&at::native::view));
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("view_as_real", &at::native::view_as_real);
  m.impl("view_as_complex", &at::native::view_as_complex);
  m.impl("set_.source_Storage", static_cast<Tensor& (*)(Tensor&, Storage)>(&at::native::set_));
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
}

// Processes talk through the host's group, on the device's memory. Torch has kernels for it, and warns of the exchange.
struct : c10::WarningHandler {
  void process(const c10::Warning&) override {}
} silent;
c10::WarningHandler* const usual = c10::WarningUtils::get_warning_handler();
const bool silenced = (c10::WarningUtils::set_warning_handler(&silent), true);

TORCH_LIBRARY_IMPL(c10d, CUDA, m) {
  for (const auto* name :
       {"send", "recv_", "recv_any_source_", "broadcast_", "reduce_", "allreduce_", "allreduce_coalesced_", "allgather_",
        "_allgather_base_", "allgather_coalesced_", "allgather_into_tensor_coalesced_", "reduce_scatter_",
        "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_", "gather_", "scatter_", "alltoall_",
        "alltoall_base_", "barrier"})
    m.impl(name, boxed());
}

const bool restored = (c10::WarningUtils::set_warning_handler(usual), true);

}  // namespace pretend

// What Python reads and sets.
extern "C" {

int pretend_devices() { return pretend::device_count(); }
int64_t pretend_live(int index) { return pretend::ledgers[index].live; }
int64_t pretend_peak(int index) { return pretend::ledgers[index].peak; }
int64_t pretend_limit(int index) { return pretend::ledgers[index].limit; }
void pretend_reset_peak(int index) { pretend::ledgers[index].peak = pretend::ledgers[index].live; }
void pretend_set_limit(int index, int64_t bytes) { pretend::ledgers[index].limit = bytes; }
void pretend_resize_storage(void* storage, size_t bytes) {
  at::native::resize_bytes_cpu(static_cast<c10::StorageImpl*>(storage), bytes);
}
}
