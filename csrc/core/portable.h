// What lets the calculus compile for hosts, devices and several instruction sets at once. No torch, no pybind11.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define RLHF_HD __host__ __device__ __forceinline__
#else
#define RLHF_HD inline
#endif

// The same source is compiled once per instruction set. Inline functions of one name would be merged by the linker,
// and an old machine might then run the newest one's copy; so each set has a namespace of its own.
#ifndef RLHF_ISA
#define RLHF_ISA portable
#endif
