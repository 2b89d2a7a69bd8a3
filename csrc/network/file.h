// A compiled network as bytes: a prefix, a header of FlatBuffers (network.fbs), and data.
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
  // Data ends with so many bytes that belong to nothing, which kernels may read.
  static constexpr std::size_t kReadPastEnd = 64;

  // Maps a file. Throws SystemError, or FileError as check() does.
  explicit File(const std::string& path);
  // Takes bytes of the caller's, aligned to 64.
  explicit File(std::span<const std::byte> bytes) : bytes_(bytes) { check(); }
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  // Gives mapped memory back, of which most was read just once. What is used comes back from the file.
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
