// What traffic.cpp counts by.
#pragma once

namespace host_cuda {

extern int counted_phase;  // of the lanes whose operation is being executed

}  // namespace host_cuda
