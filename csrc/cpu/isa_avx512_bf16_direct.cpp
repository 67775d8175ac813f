#include "target_avx512_bf16.h"
// Then, since it is compiled for that target:
#include "add_bf16_direct.h"
