// Which kernels this CPU can run.

#include "isa.h"

#include <stdexcept>

#if defined(MOE_X86)
#include <cpuid.h>
#endif

namespace moe::attention {
namespace {

constexpr const char* kNames[kNumIsas] = {"scalar", "avx2", "avx512", "avx512_bf16"};

#if defined(MOE_X86)

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);  // zeros if the CPU has no such leaf
  return r;
}

// Register files that the operating system saves: bit 2 for YMM, bits 5 to 7 for AVX-512.
unsigned saved_state() {
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

bool has(unsigned reg, std::initializer_list<int> bits) {
  for (const int bit : bits)
    if (!(reg >> bit & 1u)) return false;
  return true;
}

int level_of_this_cpu() {
  const Registers basic = cpuid(1, 0), more = cpuid(7, 0), most = cpuid(7, 1);
  if (!has(basic.c, {27}) || (saved_state() & 0x06) != 0x06) return 0;  // OSXSAVE; XMM and YMM
  if (!has(basic.c, {12, 28, 29}) || !has(more.b, {5})) return 0;        // FMA, AVX, F16C; AVX2
  if ((saved_state() & 0xe0) != 0xe0 || !has(more.b, {16, 30, 31})) return 1;  // F, BW, VL
  return has(most.a, {5}) ? 3 : 2;                                             // BF16
}

#else

int level_of_this_cpu() { return 0; }

#endif

}  // namespace

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (int i = 0; i <= level_of_this_cpu(); ++i) isas.push_back(static_cast<Isa>(i));
  return isas;
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa isa_from_name(const std::string& name) {
  std::string known;
  for (const Isa isa : available_isas()) {
    if (name == isa_name(isa)) return isa;
    known += known.empty() ? "" : ", ";
    known += isa_name(isa);
  }
  throw std::invalid_argument("no kernels for instruction set '" + name + "' on this CPU; available: " + known);
}

const Kernels& kernels_of(Isa isa) {
#if defined(MOE_X86)
  switch (isa) {
    case Isa::avx2: return kAvx2Kernels;
    case Isa::avx512: return kAvx512Kernels;
    case Isa::avx512_bf16: return kAvx512Bf16Kernels;
    case Isa::scalar: break;
  }
#endif
  (void)isa;
  return kScalarKernels;
}

}  // namespace moe::attention
