// Which of the compiled instruction sets runs: the best one that this machine has and the environment variable
// RLHF_KERNELS_ISA allows, or one that a test asks for. The variable is read once; a name that it does not know is a
// std::invalid_argument of every function here.
#pragma once
#include <string>
#include <vector>

namespace rlhf {

std::string isa();
std::vector<std::string> isas();  // Those that were compiled, run here and are allowed; the best is the last.
void set_isa(const std::string& name);

}  // namespace rlhf
