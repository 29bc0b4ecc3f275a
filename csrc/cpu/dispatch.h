// Which of the compiled instruction sets runs: the best one that this machine has, or one that a test asks for.
#pragma once
#include <string>
#include <vector>

namespace rlhf {

std::string isa();
std::vector<std::string> isas();  // those that were compiled and run here, best last
void set_isa(const std::string& name);

}  // namespace rlhf
