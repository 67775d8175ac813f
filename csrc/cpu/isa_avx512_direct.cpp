#include "target_avx512.h"
// Then, since it is compiled for that target:
#include "add_direct.h"
