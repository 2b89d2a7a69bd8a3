#include "file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <iterator>

#include "error.h"

namespace dsconv {
namespace {

static_assert(std::endian::native == std::endian::little, "files are little-endian, and are read as they are");

constexpr char kMagic[] =
    "\x89"
    "dsconv\n";
constexpr std::uint32_t kFormat = 1;

struct Prefix {
  char magic[8];
  std::uint32_t format, zero;
  std::uint64_t header_size, data_begin, data_size;
  std::uint32_t header_crc, data_crc;
  std::uint8_t zeros[16];
};
static_assert(sizeof(Prefix) == 64);

// Processes eight bytes at a time, with one table per byte ("slicing by 8").
using Tables = std::array<std::array<std::uint32_t, 256>, 8>;
constexpr Tables kTables = [] {
  Tables t{};
  for (std::uint32_t i = 0; i < 256; ++i) {
    std::uint32_t c = i;
    for (int bit = 0; bit < 8; ++bit) c = c & 1 ? 0xedb88320u ^ c >> 1 : c >> 1;
    t[0][i] = c;
  }
  for (int table = 1; table < 8; ++table)
    for (std::uint32_t i = 0; i < 256; ++i) t[table][i] = t[0][t[table - 1][i] & 255] ^ t[table - 1][i] >> 8;
  return t;
}();

}  // namespace

std::uint32_t crc32(std::span<const std::byte> bytes) {
  std::uint32_t crc = ~0u;
  std::size_t i = 0;
  for (; i + 8 <= bytes.size(); i += 8) {
    std::uint32_t low, high;
    std::memcpy(&low, bytes.data() + i, 4), std::memcpy(&high, bytes.data() + i + 4, 4);
    low ^= crc;
    crc = 0;
    for (int byte = 0; byte < 4; ++byte)
      crc ^= kTables[7 - byte][low >> 8 * byte & 255] ^ kTables[3 - byte][high >> 8 * byte & 255];
  }
  for (; i < bytes.size(); ++i) crc = kTables[0][(crc ^ std::to_integer<std::uint32_t>(bytes[i])) & 255] ^ crc >> 8;
  return ~crc;
}

File::File(const std::string& path) {
  const auto fail = [&](const char* what) { return SystemError(path + ": " + what + ": " + std::strerror(errno)); };
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe would wait for a writer
  if (file < 0) throw fail("cannot be opened");
  struct stat found{};
  const bool known = ::fstat(file, &found) == 0;
  if (!known || !S_ISREG(found.st_mode) || found.st_size <= 0) {
    const char* const expected = S_ISREG(found.st_mode) ? ": expected a file that is not empty" : ": expected a regular file";
    const SystemError error = known ? SystemError(path + expected) : fail("cannot be read");
    ::close(file);
    throw error;
  }
  const auto size = static_cast<std::size_t>(found.st_size);
  void* const memory = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0);
  const SystemError error = fail("cannot be mapped into memory");
  ::close(file);
  if (memory == MAP_FAILED) throw error;
  bytes_ = {static_cast<const std::byte*>(memory), size}, mapped_ = true;
  try {
    check();
  } catch (const FileError& found_wrong) {
    ::munmap(memory, size);
    throw FileError(path + ": " + found_wrong.what(), found_wrong.newer);
  }
}

File::~File() {
  if (mapped_) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

void File::forget() const {
  if (mapped_) ::madvise(const_cast<std::byte*>(bytes_.data()), bytes_.size(), MADV_DONTNEED);
}

void File::check() {
  Prefix p;
  if (bytes_.size() < sizeof p || std::memcmp(bytes_.data(), kMagic, sizeof p.magic) != 0)
    throw FileError("expected a compiled network, as dsconv compile writes it");
  std::memcpy(&p, bytes_.data(), sizeof p);
  if (p.format > kFormat)
    throw FileError("expected version " + std::to_string(kFormat) + " of the format, got " + std::to_string(p.format) +
                        ": install a newer dsconv runtime",
                    true);
  const auto is_zero = [](std::uint8_t byte) { return byte == 0; };
  if (p.format < 1 || p.zero || !std::all_of(std::begin(p.zeros), std::end(p.zeros), is_zero))
    throw FileError("the file is damaged: its first 64 bytes are not those of a compiled network");
  if (p.header_size > bytes_.size() - sizeof p || p.data_begin % kAlignment || p.data_begin < sizeof p + p.header_size ||
      p.data_begin > bytes_.size() || p.data_size != bytes_.size() - p.data_begin || p.data_size < kReadPastEnd)
    throw FileError("the file is damaged: it has " + std::to_string(bytes_.size()) +
                    " bytes, which are not those that it tells of");
  header_ = bytes_.subspan(sizeof p, p.header_size), data_ = bytes_.subspan(p.data_begin);
  if (crc32(header_) != p.header_crc || crc32(data_) != p.data_crc) throw FileError("the file is damaged: its checksum is wrong");
  forget();
}

}  // namespace dsconv
