// Which kernels this CPU can run.
#pragma once

#include <string>
#include <vector>

#include "kernel.h"

namespace moe::cpu {

// Instruction sets with kernels that this CPU runs, slowest first; scalar is always one of them.
std::vector<Isa> available_isas();

const char* isa_name(Isa isa);

// Raises std::invalid_argument, naming what is available, if there is no such instruction set here.
Isa isa_from_name(const std::string& name);

const Kernels& kernels_of(Isa isa);

}  // namespace moe::cpu
