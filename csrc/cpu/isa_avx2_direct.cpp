#include "target_avx2.h"
// Then, since it is compiled for that target:
#include "add_direct.h"
