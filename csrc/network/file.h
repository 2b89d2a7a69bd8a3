// A compiled network as bytes: a prefix, a FlatBuffers header (network.fbs), and data.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace dsconv {

class File {
 public:
  static constexpr std::size_t kAlignment = 64;
  // Padding bytes at the end of the data, which kernels may read.
  static constexpr std::size_t kReadPastEnd = 64;

  // Maps a file. Throws SystemError, or FileError as check() does.
  explicit File(const std::string& path);
  // Uses memory of the caller, aligned to 64 bytes.
  explicit File(std::span<const std::byte> bytes) : bytes_(bytes) { check(); }
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  // Releases mapped pages, most of which are read only once. Pages in use are loaded from the file again.
  void forget() const;
  std::span<const std::byte> header() const { return header_; }
  std::span<const std::byte> data() const { return data_; }

 private:
  void check();  // throws FileError unless prefix, sizes and checksums agree

  std::span<const std::byte> bytes_, header_, data_;
  bool mapped_ = false;
};

// Returns the CRC-32 of zlib.
std::uint32_t crc32(std::span<const std::byte>);

}  // namespace dsconv
