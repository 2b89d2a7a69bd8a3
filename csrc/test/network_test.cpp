// Runs damaged files of compiled networks: for any contents, the library must not access memory out of bounds or allocate
// too much. Built with sanitizers. Usage: network_test ITERATIONS SEED FILE...; it runs each undamaged file with every
// instruction set and prints a checksum of its outputs, and then ITERATIONS damaged ones. With DSCONV_LIBFUZZER it is a
// target of libFuzzer, with files as the corpus.
#include <dsconv.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "../isa/choice.h"
#include "../network/file.h"

namespace {

using Bytes = std::vector<std::uint8_t>;

constexpr std::size_t kPrefix = 64;
constexpr double kMaxValues = 1 << 16;    // limit for an input or output of a run
constexpr std::size_t kMaxRun = 1 << 20;  // limit for the bytes of a run

template <class T>
T read(const Bytes& bytes, std::size_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}
template <class T>
void write(Bytes& bytes, std::size_t at, T value) {
  std::memcpy(bytes.data() + at, &value, sizeof value);
}

// Corrects sizes and checksums, so that damage reaches the later checks.
void repair(Bytes& bytes) {
  if (bytes.size() < 2 * kPrefix) return;
  const std::size_t room = bytes.size() - kPrefix;
  const std::size_t header = std::min<std::size_t>(read<std::uint64_t>(bytes, 16), room - kPrefix);
  const std::size_t begin = (kPrefix + header + 63) / 64 * 64;
  std::memcpy(bytes.data(),
              "\x89"
              "dsconv\n\x01\0\0\0\0\0\0\0",
              16);
  write<std::uint64_t>(bytes, 16, header);
  write<std::uint64_t>(bytes, 24, begin);
  write<std::uint64_t>(bytes, 32, bytes.size() - begin);
  const auto crc = [&](std::size_t first, std::size_t end) {
    return dsconv::crc32(std::as_bytes(std::span(bytes.data() + first, end - first)));
  };
  write<std::uint32_t>(bytes, 40, crc(kPrefix, kPrefix + header));
  write<std::uint32_t>(bytes, 44, crc(begin, bytes.size()));
}

struct Aligned {
  explicit Aligned(const Bytes& bytes) : data(::operator new(bytes.size(), std::align_val_t{64})) {
    std::memcpy(data, bytes.data(), bytes.size());
  }
  ~Aligned() { ::operator delete(data, std::align_val_t{64}); }
  void* data;
};

std::size_t values_of(const dsconv_tensor& tensor) {
  double values = 1;
  for (std::size_t i = 0; i < tensor.rank; ++i) values *= static_cast<double>(tensor.shape[i]);
  return values <= kMaxValues ? static_cast<std::size_t>(values) : 0;
}

// Runs samples of a size with `more` rows and columns; returns the values of all outputs, or none if it is too large or
// fails.
std::vector<float> run(const dsconv_network* network, std::size_t size, std::int64_t samples, std::int64_t more) {
  std::vector<dsconv_tensor> inputs(dsconv_input_count(network)), outputs(dsconv_output_count(network));
  std::vector<std::vector<float>> memory;
  const auto prepare = [&](dsconv_tensor& tensor, std::vector<float> (*filled)(std::size_t)) {
    tensor.strides = nullptr;
    const std::size_t values = values_of(tensor);
    if (values) memory.push_back(filled(values)), tensor.data = memory.back().data(), tensor.bytes = values * sizeof(float);
    return values != 0;
  };
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    if (dsconv_input_shape(network, size, i, &inputs[i]) != DSCONV_OK) return {};
    inputs[i].shape[0] = samples;
    for (std::size_t d = 2; d < inputs[i].rank; ++d) inputs[i].shape[d] += more;
    const auto waves = [](std::size_t count) {
      std::vector<float> values(count);
      for (std::size_t v = 0; v < count; ++v) values[v] = std::sin(0.7f * static_cast<float>(v));
      return values;
    };
    if (!prepare(inputs[i], waves)) return {};
  }
  std::size_t bytes = 0;
  if (dsconv_run_bytes(network, inputs.data(), inputs.size(), &bytes) != DSCONV_OK || bytes > kMaxRun) return {};
  if (dsconv_run(network, inputs.data(), inputs.size(), outputs.data(), outputs.size()) != DSCONV_OK) return {};
  const std::size_t first = memory.size();
  for (dsconv_tensor& output : outputs)
    if (!prepare(output, [](std::size_t count) { return std::vector<float>(count); })) return {};
  if (dsconv_run(network, inputs.data(), inputs.size(), outputs.data(), outputs.size()) != DSCONV_OK) return {};
  std::vector<float> all;
  for (std::size_t i = first; i < memory.size(); ++i) all.insert(all.end(), memory[i].begin(), memory[i].end());
  return all;
}

// Opens a file and runs it; returns all outputs.
std::vector<float> open_and_run(const Bytes& bytes) {
  const Aligned file(bytes);
  dsconv_network* network = nullptr;
  if (dsconv_open_memory(file.data, bytes.size(), &network) != DSCONV_OK) return {};
  std::vector<float> all;
  for (std::size_t size = 0; size < std::min<std::size_t>(2, dsconv_size_count(network)); ++size)
    for (const std::int64_t samples : {1, 3}) {
      const std::int64_t step = dsconv_size_step(network);
      for (const std::int64_t more : {std::int64_t{0}, std::clamp<std::int64_t>(step, 0, 64)}) {
        const std::vector<float> made = run(network, size, samples, more);
        all.insert(all.end(), made.begin(), made.end());
        if (!step) break;
      }
    }
  dsconv_close(network);
  return all;
}

}  // namespace

#ifdef DSCONV_LIBFUZZER

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (!size) return 0;
  Bytes bytes(data, data + size);
  repair(bytes);
  open_and_run(bytes);
  return 0;
}

#else

namespace {

class Damage {
 public:
  explicit Damage(std::uint64_t seed) : random_(seed) {}

  void apply(Bytes& bytes) {
    const std::size_t header = std::min<std::size_t>(read<std::uint64_t>(bytes, 16), bytes.size() - kPrefix - 8);
    for (std::uint64_t edits = 1 + below(6); edits; --edits) {
      const std::size_t at = kPrefix + below(below(4) ? header : bytes.size() - kPrefix - 8);
      static constexpr std::int64_t kOdd[] = {
          0, 1, 2, 3, 8, 64, -1, -128, INT32_MAX, INT32_MIN, 1LL << 31, 1LL << 40, 1LL << 60, 1LL << 62, INT64_MAX, INT64_MIN};
      const std::int64_t odd = below(2) ? kOdd[below(std::size(kOdd))] : static_cast<std::int64_t>(below(300));
      switch (below(5)) {
        case 0: bytes[at] ^= static_cast<std::uint8_t>(1u << below(8)); break;
        case 1: bytes[at] = static_cast<std::uint8_t>(odd); break;
        case 2: write(bytes, at / 4 * 4, static_cast<std::int32_t>(odd)); break;
        case 3: write(bytes, at / 8 * 8, odd); break;
        default: write(bytes, at / 4 * 4, read<std::int32_t>(bytes, (kPrefix + below(header)) / 4 * 4)); break;
      }
    }
    if (!below(20)) bytes.resize(2 * kPrefix + below(bytes.size() - 2 * kPrefix));
  }

 private:
  std::uint64_t below(std::uint64_t end) { return random_() % end; }
  std::mt19937_64 random_;
};

bool check(const char* path, const Bytes& bytes) {
  setenv("DSCONV_MAX_ISA", "scalar", 1);
  const std::vector<float> expected = open_and_run(bytes);
  if (expected.empty()) {
    std::fprintf(stderr, "%s: %s\n", path, dsconv_error());
    return false;
  }
  for (const dsconv::Kernels* kernels : dsconv::usable_kernels()) {
    setenv("DSCONV_MAX_ISA", kernels->isa, 1);
    const std::vector<float> made = open_and_run(bytes);
    if (made.size() == expected.size() && !std::memcmp(made.data(), expected.data(), made.size() * sizeof(float))) continue;
    std::fprintf(stderr, "%s: %s has other bits than the scalar kernels\n", path, kernels->isa);
    return false;
  }
  std::printf("%s: outputs %08x\n", path, dsconv::crc32(std::as_bytes(std::span(expected))));
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 4) return std::fprintf(stderr, "usage: network_test ITERATIONS SEED FILE...\n"), 2;
  const long iterations = std::atol(arguments[1]);
  Damage damage(static_cast<std::uint64_t>(std::atoll(arguments[2])));
  std::vector<Bytes> files;
  for (int i = 3; i < count; ++i) {
    std::ifstream in(arguments[i], std::ios::binary);
    files.emplace_back(std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>());
    if (!check(arguments[i], files.back())) return 1;
  }
  long opened = 0;
  for (long i = 0; i < iterations; ++i) {
    Bytes bytes = files[static_cast<std::size_t>(i) % files.size()];
    damage.apply(bytes);
    repair(bytes);
    opened += !open_and_run(bytes).empty();
  }
  std::printf("%zu files, %ld damaged ones: %ld of these were run\n", files.size(), iterations, opened);
  return 0;
}

#endif
