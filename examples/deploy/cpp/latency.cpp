// Runs a network on noise and prints its latency: latency NETWORK.dsconv [THREADS [RUNS]]
// Several threads share one network, and each runs it independently, as in a server with parallel requests.
#include <dsconv.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

double milliseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

void check(dsconv_status status) {
  if (status != DSCONV_OK) throw std::runtime_error(dsconv_error());
}

struct Close {
  void operator()(dsconv_network* network) const { dsconv_close(network); }
};
using Network = std::unique_ptr<dsconv_network, Close>;

Network open(const char* path) {
  dsconv_network* network = nullptr;
  check(dsconv_open(path, &network));
  return Network(network);
}

// A tensor and its values.
struct Array {
  dsconv_tensor tensor{};
  std::vector<float> values;

  void allocate() {
    std::size_t count = 1;
    for (std::size_t i = 0; i < tensor.rank; ++i) count *= static_cast<std::size_t>(tensor.shape[i]);
    values.resize(count);
    tensor.data = values.data();
    tensor.bytes = count * sizeof(float);
  }
};

// Returns one sample of noise for each input, in the first size that the network accepts.
std::vector<Array> noise(const dsconv_network* network, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<Array> inputs(dsconv_input_count(network));
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    check(dsconv_input_shape(network, 0, i, &inputs[i].tensor));
    for (auto& size : inputs[i].tensor.shape) size = size < 0 ? 1 : size;
    inputs[i].allocate();
    for (auto& value : inputs[i].values) value = normal(generator);
  }
  return inputs;
}

std::vector<dsconv_tensor> tensors(const std::vector<Array>& arrays) {
  std::vector<dsconv_tensor> result;
  for (const auto& array : arrays) result.push_back(array.tensor);
  return result;
}

// Returns the milliseconds of each run.
std::vector<double> run(const dsconv_network* network, unsigned seed, int runs) {
  const auto arrays = noise(network, seed);
  const auto inputs = tensors(arrays);
  std::vector<dsconv_tensor> outputs(dsconv_output_count(network));
  check(dsconv_run(network, inputs.data(), inputs.size(), outputs.data(), outputs.size()));  // sets the shapes
  std::vector<Array> results;
  for (const auto& output : outputs) {
    results.push_back({output, {}});
    results.back().allocate();
  }
  outputs = tensors(results);
  std::vector<double> milliseconds;
  for (int i = 0; i < runs; ++i) {
    const auto start = Clock::now();
    check(dsconv_run(network, inputs.data(), inputs.size(), outputs.data(), outputs.size()));
    milliseconds.push_back(milliseconds_since(start));
  }
  return milliseconds;
}

}  // namespace

int main(int argc, char** argv) try {
  const auto start = Clock::now();
  if (argc < 2 || argc > 4) throw std::runtime_error("expected NETWORK.dsconv [THREADS [RUNS]]");
  const int threads = argc > 2 ? std::atoi(argv[2]) : 1, runs = argc > 3 ? std::atoi(argv[3]) : 20;
  if (threads < 1 || runs < 1) throw std::runtime_error("THREADS and RUNS: expected numbers from 1");
  check(dsconv_set_threads(1));
  const Network network = open(argv[1]);
  run(network.get(), 0, 1);
  std::printf("dsconv %s (%s): first result after %.3f ms\n", dsconv_version(), dsconv_isa(), milliseconds_since(start));
  std::fflush(stdout);

  std::vector<std::vector<double>> times(static_cast<std::size_t>(threads));
  std::vector<std::exception_ptr> errors(times.size());
  std::vector<std::thread> pool;
  for (std::size_t i = 0; i < times.size(); ++i) {
    pool.emplace_back([&, i] {
      try {
        times[i] = run(network.get(), static_cast<unsigned>(i), runs);
      } catch (...) {
        errors[i] = std::current_exception();
      }
    });
  }
  for (auto& thread : pool) thread.join();
  for (const auto& error : errors) {
    if (error) std::rethrow_exception(error);
  }
  std::vector<double> all;
  for (const auto& some : times) all.insert(all.end(), some.begin(), some.end());
  std::sort(all.begin(), all.end());
  std::printf("%zu runs by %d threads: median %.3f ms, slowest %.3f ms\n", all.size(), threads, all[all.size() / 2], all.back());
  return EXIT_SUCCESS;
} catch (const std::exception& error) {
  std::fprintf(stderr, "latency: %s\n", error.what());
  return EXIT_FAILURE;
}
