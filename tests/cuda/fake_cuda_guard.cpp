// What torch's C++ side asks of a CUDA device before Python is asked at all: a device that is always idle, a generator
// of random numbers, pinned host memory, and the choice of an attention kernel. tests/fake_cuda.py builds and loads it.
#include <ATen/Context.h>
#include <ATen/SDPBackend.h>
#include <ATen/core/Generator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/zeros.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/GeneratorImpl.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <mutex>
#include <unordered_set>

namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);

// autograd refuses to run backward for a device that has no guard
struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Device getDevice() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = const_cast<c10::Device*>(&kDevice);  // any address: an event is never looked into
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

struct Generator : c10::GeneratorImpl {
  Generator() : c10::GeneratorImpl(kDevice, c10::DispatchKeySet(c10::DispatchKey::CUDA)) {}
  void set_current_seed(uint64_t seed) override { seed_ = seed; }
  uint64_t current_seed() const override { return seed_; }
  uint64_t seed() override { return seed_; }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  void set_state(const c10::TensorImpl&) override {}
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return at::zeros({16}, at::kByte).getIntrusivePtr();
  }
  Generator* clone_impl() const override { return new Generator(); }

 private:
  uint64_t seed_ = 0;
};

// Memory of the host that remembers where it is, so that Tensor.is_pinned tells it from other memory.
struct PinnedMemory : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    c10::DataPtr data = c10::GetCPUAllocator()->allocate(bytes);
    void* address = data.get();
    std::lock_guard<std::mutex> lock(mutex());
    addresses().insert(address);
    data.release_context();
    return {address, address, &forget, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &forget; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
  static bool has(const void* address) {
    std::lock_guard<std::mutex> lock(mutex());
    return addresses().count(address) > 0;
  }

 private:
  static void forget(void* address) {
    {
      std::lock_guard<std::mutex> lock(mutex());
      addresses().erase(address);
    }
    c10::GetCPUAllocator()->raw_deallocate(address);
  }
  static std::mutex& mutex() {
    static std::mutex mutex;
    return mutex;
  }
  static std::unordered_set<const void*>& addresses() {
    static std::unordered_set<const void*> addresses;
    return addresses;
  }
};

struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
  void init() const override {}
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static const at::Generator generator = at::make_generator<Generator>();
    return generator;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    static PinnedMemory memory;
    return &memory;
  }
  bool isPinnedPtr(const void* address) const override { return PinnedMemory::has(address); }
};

// The fused kernels that a H100 takes for plain causal attention, unless the caller turned them off (sdpa_kernel).
int64_t choose_attention(const at::Tensor& query, const at::Tensor&, const at::Tensor&,
                         const std::optional<at::Tensor>& mask, double, bool, std::optional<double>, bool) {
  const bool half = query.scalar_type() == at::kHalf || query.scalar_type() == at::kBFloat16;
  at::SDPBackend backend = at::SDPBackend::math;
  if (half && !mask && at::globalContext().userEnabledFlashSDP()) {
    backend = at::SDPBackend::flash_attention;
  } else if (query.scalar_type() != at::kDouble && at::globalContext().userEnabledMemEfficientSDP()) {
    backend = at::SDPBackend::efficient_attention;
  }
  return static_cast<int64_t>(backend);
}

const at::native::RegisterCUDADispatch attention(at::native::_fused_sdp_choice_stub, &choose_attention);
const c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new Guard());

}  // namespace

namespace at {
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", Hooks);
}
