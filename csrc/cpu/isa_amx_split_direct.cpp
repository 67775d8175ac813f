#include "target_amx.h"
// Then, since it is compiled for that target:
#include "add_split_direct.h"
