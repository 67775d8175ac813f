#include "target_portable.h"
// Then, since it is compiled for that target:
#include "add_bf16_winograd2.h"
