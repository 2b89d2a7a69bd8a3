// The C interface: it exposes no exceptions and no C++ types.
#include <dsconv.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif
#include <thread>

#include "../isa/choice.h"
#include "../parallel.h"
#include "../scratch.h"
#include "error.h"
#include "network.h"

struct dsconv_network {
  dsconv::Network network;
};

namespace {

using namespace dsconv;

constexpr int kMostThreads = 1024;
thread_local std::string last_error;

dsconv_status failed(dsconv_status status, const char* what) noexcept {
  try {
    last_error = what;
  } catch (...) {
    last_error.clear();
  }
  return status;
}

// Runs a function, and returns its status.
template <class Function>
dsconv_status guarded(Function function) noexcept {
  try {
    function();
    return DSCONV_OK;
  } catch (const FileError& error) {
    return failed(error.newer ? DSCONV_UNSUPPORTED : DSCONV_INVALID_FILE, error.what());
  } catch (const SystemError& error) {
    return failed(DSCONV_IO_ERROR, error.what());
  } catch (const std::invalid_argument& error) {
    return failed(DSCONV_INVALID_ARGUMENT, error.what());
  } catch (const NoMemory& error) {
    return failed(DSCONV_NO_MEMORY, error.what());
  } catch (const std::bad_alloc&) {
    return failed(DSCONV_NO_MEMORY, "there is not enough memory");
  } catch (const std::length_error&) {
    return failed(DSCONV_NO_MEMORY, "more memory is needed than a process can have");
  } catch (const std::exception& error) {
    return failed(DSCONV_INTERNAL_ERROR, error.what());
  } catch (...) {
    return failed(DSCONV_INTERNAL_ERROR, "an unknown error");
  }
}

void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument(what);
}

int usable_processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::clamp(CPU_COUNT(&set), 1, kMostThreads);
#endif
  return std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, kMostThreads);
}

std::atomic<int> threads{0};

void use_threads(int count) {
  threads = count;
  pool_threads(count);
  expected_threads = count;
  parallel_for = parallel_for_of_pool;
}

void begin() {
  if (!threads) use_threads(usable_processors());
}

const Kernels& kernels() {
  const char* const at_most = std::getenv("DSCONV_MAX_ISA");
  return best_kernels(at_most ? at_most : "");
}

dsconv_status open_file(std::shared_ptr<const File> (*file_of)(const void*, std::size_t), const void* of, std::size_t size,
                        dsconv_network** network) {
  return guarded([&] {
    if (network) *network = nullptr;
    require(network && of, "open: expected a file and a place for the network, got NULL");
    begin();
    const std::shared_ptr<const File> file = file_of(of, size);
    *network = new dsconv_network{Network(file, kernels())};
    file->forget();
#if defined(__GLIBC__)
    malloc_trim(0);  // frees the memory that packing needed
#endif
  });
}

void set_shape(dsconv_tensor* to, std::int64_t samples, const Shape& shape) {
  to->type = DSCONV_FLOAT32;
  to->rank = shape.size() + 1;
  to->shape[0] = samples;
  std::copy(shape.begin(), shape.end(), to->shape + 1);
}

// Returns the strides of a tensor in values, after a check against its memory.
Shape strides_of(const dsconv_tensor& tensor, const std::string& what) {
  Shape strides(tensor.rank);
  double values = 1, last = 0;
  for (std::size_t i = tensor.rank; i-- > 0;) {
    strides[i] = tensor.strides ? tensor.strides[i] : static_cast<std::int64_t>(values);
    require(strides[i] >= 0, what + ": expected strides that are not negative, got " + std::to_string(strides[i]));
    last += static_cast<double>(tensor.shape[i] - 1) * static_cast<double>(strides[i]);
    values *= static_cast<double>(tensor.shape[i]);
    require(values < 1e17 && last < 1e17, what + ": it is larger than any memory");
  }
  const double needed = values == 0 ? 0 : (last + 1) * sizeof(float);
  require(static_cast<double>(tensor.bytes) >= needed, what + ": expected " + std::to_string(static_cast<std::size_t>(needed)) +
                                                           " bytes of memory, got " + std::to_string(tensor.bytes));
  require(needed == 0 || tensor.data, what + ": expected the address of its values, got NULL");
  require(reinterpret_cast<std::uintptr_t>(tensor.data) % alignof(float) == 0,
          what + ": expected an address that is a multiple of 4");
  return strides;
}

void require_count(std::size_t wanted, std::size_t got, const std::string& what, const void* at) {
  require(wanted == got && at, "expected " + std::to_string(wanted) + " " + what + (wanted == 1 ? "" : "s") + ", got " +
                                   (at ? std::to_string(got) : "NULL"));
}

std::string name(const char* kind, const std::string& of) { return std::string(kind) + " '" + of + "'"; }

std::vector<Shape> shapes_of(const Network& network, const dsconv_tensor* inputs, std::size_t input_count) {
  require_count(network.inputs().size(), input_count, "input", inputs);
  std::vector<Shape> shapes;
  for (std::size_t i = 0; i < input_count; ++i) {
    const std::string what = name("input", network.inputs()[i]);
    require(inputs[i].type == DSCONV_FLOAT32, what + ": expected type DSCONV_FLOAT32 (1), got " + std::to_string(inputs[i].type));
    require(inputs[i].rank >= 1 && inputs[i].rank <= DSCONV_MAX_RANK,
            what + ": expected 1 to 8 dimensions, got " + std::to_string(inputs[i].rank));
    shapes.emplace_back(inputs[i].shape, inputs[i].shape + inputs[i].rank);
  }
  return shapes;
}

void run(const Network& network, const dsconv_tensor* inputs, std::size_t input_count, dsconv_tensor* outputs,
         std::size_t output_count) {
  const std::vector<Shape> shapes = shapes_of(network, inputs, input_count);
  require_count(network.outputs().size(), output_count, "output", outputs);
  const std::shared_ptr<const Network::Compiled> compiled = network.compiled_for(shapes);
  bool wanted = false;
  for (std::size_t i = 0; i < output_count; ++i) {
    set_shape(&outputs[i], shapes[0][0], compiled->outputs[i].shape);
    wanted |= outputs[i].data != nullptr;
  }
  if (!wanted || !shapes[0][0]) return;
  std::vector<UserTensor> from, to;
  for (std::size_t i = 0; i < input_count; ++i)
    from.push_back({static_cast<float*>(inputs[i].data), shapes[i], strides_of(inputs[i], name("input", network.inputs()[i]))});
  for (std::size_t i = 0; i < output_count; ++i) {
    const dsconv_tensor& t = outputs[i];
    to.push_back({static_cast<float*>(t.data), Shape(t.shape, t.shape + t.rank), {}});
    to.back().strides = t.data ? strides_of(t, name("output", network.outputs()[i])) : Shape(t.rank);
  }
  begin();
  network.run(*compiled, from, to);
}

const char* text(const std::vector<std::string>& all, std::size_t index) {
  return index < all.size() ? all[index].c_str() : nullptr;
}

dsconv_status shape_of(const std::vector<Shape> Network::Size::* shapes, const dsconv_network* of, std::size_t size,
                       std::size_t index, dsconv_tensor* tensor) {
  return guarded([&] {
    require(of && tensor, "expected a network and a tensor, got NULL");
    require(size < of->network.sizes().size(), "size: expected one below " + std::to_string(of->network.sizes().size()));
    const std::vector<Shape>& all = of->network.sizes()[size].*shapes;
    require(index < all.size(), "index: expected one below " + std::to_string(all.size()) + ", got " + std::to_string(index));
    set_shape(tensor, -1, all[index]);
  });
}

}  // namespace

extern "C" {

uint32_t dsconv_abi_version(void) { return DSCONV_ABI_VERSION; }
const char* dsconv_version(void) { return DSCONV_VERSION; }
const char* dsconv_error(void) { return last_error.c_str(); }

const char* dsconv_isa(void) {
  const char* isa = "";
  guarded([&] { isa = kernels().isa; });
  return isa;
}

dsconv_status dsconv_set_threads(int count) {
  return guarded([&] {
    require(count >= 1 && count <= kMostThreads, "threads: expected 1 to 1024, got " + std::to_string(count));
    use_threads(count);
  });
}

int dsconv_threads(void) {
  begin();
  return threads;
}

dsconv_status dsconv_open(const char* path, dsconv_network** network) {
  const auto file_of = [](const void* of, std::size_t) {
    return std::shared_ptr<const File>(std::make_shared<File>(std::string(static_cast<const char*>(of))));
  };
  return open_file(file_of, path, 0, network);
}

dsconv_status dsconv_open_memory(const void* data, size_t size, dsconv_network** network) {
  const auto file_of = [](const void* of, std::size_t bytes) {
    require(reinterpret_cast<std::uintptr_t>(of) % File::kAlignment == 0, "data: expected an address that is a multiple of 64");
    return std::shared_ptr<const File>(std::make_shared<File>(std::span(static_cast<const std::byte*>(of), bytes)));
  };
  return open_file(file_of, data, size, network);
}

void dsconv_close(dsconv_network* network) { delete network; }

size_t dsconv_input_count(const dsconv_network* of) { return of ? of->network.inputs().size() : 0; }
size_t dsconv_output_count(const dsconv_network* of) { return of ? of->network.outputs().size() : 0; }
const char* dsconv_input_name(const dsconv_network* of, size_t index) { return of ? text(of->network.inputs(), index) : nullptr; }
const char* dsconv_output_name(const dsconv_network* of, size_t index) { return of ? text(of->network.outputs(), index) : nullptr; }

size_t dsconv_size_count(const dsconv_network* of) { return of ? of->network.sizes().size() : 0; }
dsconv_status dsconv_input_shape(const dsconv_network* of, size_t size, size_t index, dsconv_tensor* tensor) {
  return shape_of(&Network::Size::inputs, of, size, index, tensor);
}
dsconv_status dsconv_output_shape(const dsconv_network* of, size_t size, size_t index, dsconv_tensor* tensor) {
  return shape_of(&Network::Size::outputs, of, size, index, tensor);
}

int64_t dsconv_size_step(const dsconv_network* of) { return of ? of->network.size_step() : 0; }

const char* dsconv_preprocess(const dsconv_network* of) {
  return of && of->network.preprocess() ? of->network.preprocess()->c_str() : nullptr;
}
size_t dsconv_class_count(const dsconv_network* of) { return of ? of->network.classes().size() : 0; }
const char* dsconv_class_name(const dsconv_network* of, size_t index) { return of ? text(of->network.classes(), index) : nullptr; }

size_t dsconv_weight_bytes(const dsconv_network* of) { return of ? static_cast<size_t>(of->network.weight_bytes()) : 0; }
dsconv_status dsconv_run_bytes(const dsconv_network* of, const dsconv_tensor* inputs, size_t input_count, size_t* bytes) {
  return guarded([&] {
    require(of && bytes, "expected a network and a place for the number, got NULL");
    const std::vector<Shape> shapes = shapes_of(of->network, inputs, input_count);
    const double needed = of->network.compiled_for(shapes)->run_bytes(shapes[0][0]);
    *bytes = needed < 1e18 ? static_cast<size_t>(needed) : SIZE_MAX;
  });
}

dsconv_status dsconv_run(const dsconv_network* of, const dsconv_tensor* inputs, size_t input_count, dsconv_tensor* outputs,
                         size_t output_count) {
  return guarded([&] {
    require(of, "run: expected a network, got NULL");
    run(of->network, inputs, input_count, outputs, output_count);
  });
}

}  // extern "C"
