// What torch asks of a device beside kernels: which is current, streams and events, pinned memory, generators.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "copies.h"

namespace pretend {

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return at::kCUDA; }
  Device getDevice() const override { return {at::kCUDA, current}; }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() < device_count(), "CUDA error: invalid device ordinal");
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.has_index()) current = device.index();
  }
  Device exchangeDevice(Device device) const override {
    const auto before = getDevice();
    setDevice(device);
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return device_count(); }
  // One stream for each device, in whose order everything happens.
  c10::Stream getStream(Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(Device device) const override { return getStream(device); }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override { return getStream(device); }
  c10::Stream getNewStream(Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { wait(); }
  void synchronizeEvent(void*) const override { wait(); }
  void synchronizeDevice(const DeviceIndex) const override { wait(); }
  double elapsedTime(void*, void*, const DeviceIndex) const override { return 0; }
};
Guard guard;
c10::impl::DeviceGuardImplRegistrar registered(at::kCUDA, &guard);

}  // namespace pretend

namespace at {

// The registry knows the hooks by this very name.
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return pretend::device_count(); }
  int getNumGPUs() const override { return pretend::device_count(); }
  DeviceIndex current_device() const override { return pretend::current; }
  DeviceIndex getCurrentDevice() const override { return pretend::current; }
  void setCurrentDevice(DeviceIndex index) const override { pretend::guard.setDevice({kCUDA, index}); }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    return pretend::guard.exchangeDevice({kCUDA, index}).index();
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override {
    return index < 0 ? pretend::current : exchangeDevice(index);
  }
  void deviceSynchronize(DeviceIndex) const override { pretend::wait(); }
  Device getDeviceFromPtr(void*) const override { return {kCUDA, pretend::current}; }
  Allocator* getPinnedMemoryAllocator() const override { return &pretend::pinned_allocator; }
  Allocator* getCUDADeviceAllocator() const override { return &pretend::device_allocator; }
  bool isPinnedPtr(const void* data) const override { return pretend::is_pinned(data); }
  // Random numbers come from the host's generators, so that seeds give the CPU's.
  const Generator& getDefaultGenerator(DeviceIndex) const override { return detail::getDefaultCPUGenerator(); }
  Generator getNewGenerator(DeviceIndex) const override { return detail::createCPUGenerator(); }
};
REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace at
