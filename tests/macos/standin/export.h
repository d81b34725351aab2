// Functions of the stand-in that tests call through ctypes.
#pragma once

#define STANDIN_EXPORT extern "C" __attribute__((visibility("default")))
