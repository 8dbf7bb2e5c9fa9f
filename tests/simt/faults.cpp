// Kernels with one fault each, for the test of the emulator.
#include "cuda/device.h"

namespace {

using namespace wn::cuda;

WN_KERNEL(64, 1) correct(float* out) {
  float* memory = shared<float>();
  memory[tid()] = static_cast<float>(tid());
  block_sync();
  out[tid()] = shfl_xor(~0u, memory[63 - tid()], 1);
}
WN_KERNEL(64, 1) leaves_early(float*) {
  if (tid() == 5) return;
  block_sync();
}
WN_KERNEL(64, 1) diverges(float*) {
  if (tid() == 5) block_sync();
  else cluster_sync();
}
WN_KERNEL(64, 1) asks_a_stranger(float* out) { out[tid()] = shfl_xor(0xffu << tid() / 8 % 4 * 8, 1.0f, 8); }
WN_KERNEL(64, 1) wrong_mask(float* out) { out[tid()] = shfl_xor(0xffu, 1.0f, 1); }
WN_KERNEL(64, 1) unaligned(float* out) { store<16>(out + 1, Words{}); }
WN_KERNEL(64, 1) unwritten(float* out) { out[tid()] = shared<float>()[tid()]; }
WN_KERNEL(64, 1) far_peer(float* out) { out[tid()] = *peer(shared<float>(), 2); }

}  // namespace

// Runs one of them on out, 64 floats; returns what the emulator says.
extern "C" const char* simt_fault(int which, float* out) {
  static std::string error;
  error.clear();
  void (*const kernels[])(float*) = {correct,    leaves_early, diverges,  asks_a_stranger,
                                     wrong_mask, unaligned,    unwritten, far_peer};
  try {
    launch("fault", {2, 64, 2, 256}, nullptr, kernels[which], out);
  } catch (const std::exception& e) {
    error = e.what();
  }
  return error.c_str();
}
