#include "detect.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace dsconv {

#if defined(__x86_64__)
namespace {

struct Registers {
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);  // leaves zeros if the leaf does not exist
  return r;
}

constexpr bool bit(std::uint64_t word, int position) { return (word >> position) & 1; }

// Returns the register files that the operating system saves on a context switch. The instruction is written as bytes
// because the intrinsic needs a target flag that would let the compiler use it before OSXSAVE is checked.
std::uint64_t xgetbv0() {
  std::uint32_t low, high;
  __asm__ volatile(".byte 0x0f, 0x01, 0xd0" : "=a"(low), "=d"(high) : "c"(0));
  return (std::uint64_t{high} << 32) | low;
}

// Linux kills a process that uses AMX tiles before it has requested permission.
bool kernel_grants_amx() {
#if defined(__linux__)
  constexpr long arch_req_xcomp_perm = 0x1023, xfeature_xtiledata = 18;
  return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0;
#else
  return false;
#endif
}

}  // namespace

std::vector<std::string_view> isa_found() {
  std::vector<std::string_view> found{"scalar"};
  const Registers basic = cpuid(1, 0), extended = cpuid(7, 0), extended1 = cpuid(7, 1);
  if (!bit(basic.ecx, 27)) return found;  // OSXSAVE: without it XGETBV faults and no wide register is saved

  const std::uint64_t saved = xgetbv0();
  const auto os_saves = [saved](std::uint64_t mask) { return (saved & mask) == mask; };
  const bool ymm = os_saves(0x6), zmm = os_saves(0xe6), tiles = os_saves(0x60000);

  const bool fma = bit(basic.ecx, 12);
  const bool avx2 = ymm && fma && bit(extended.ebx, 5);
  // F, DQ, BW, VL, VNNI
  const bool avx512 = zmm && bit(extended.ebx, 16) && bit(extended.ebx, 17) && bit(extended.ebx, 30) && bit(extended.ebx, 31) &&
                      bit(extended.ecx, 11);
  if (avx2) found.push_back("avx2");
  if (avx2 && bit(extended1.eax, 4)) found.push_back("avxvnni");
  if (avx2 && avx512) found.push_back("avx512vnni");
  if (avx2 && avx512 && tiles && bit(extended.edx, 24) && bit(extended.edx, 25) && kernel_grants_amx())  // TILE, INT8
    found.push_back("amx");
  return found;
}

#elif defined(__aarch64__)

std::vector<std::string_view> isa_found() {
  std::vector<std::string_view> found{"scalar", "neon"};  // NEON is part of every AArch64 processor
#if defined(__linux__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found.push_back("neondotprod");
#endif
  return found;
}

#else

std::vector<std::string_view> isa_found() { return {"scalar"}; }

#endif

}  // namespace dsconv
