#include "neighbours.h"
