// What csrc/metal and torch's headers use of Foundation, declared by hand for type checks without
// macOS. Selectors are compared with an independent list (tests/macos/link.py).
#pragma once

#include <dispatch/dispatch.h>
#include <objc/NSObject.h>
#include <objc/objc.h>
#include <stddef.h>
#include <stdint.h>

#pragma clang assume_nonnull begin

@class NSString;

@interface NSError : NSObject
@property(readonly, copy) NSString* localizedDescription;
@end

@interface NSString : NSObject
+ (nullable instancetype)stringWithUTF8String:(const char*)text;
@property(readonly, nullable) const char* UTF8String;
@end

@interface NSDictionary : NSObject
@end

#pragma clang assume_nonnull end
