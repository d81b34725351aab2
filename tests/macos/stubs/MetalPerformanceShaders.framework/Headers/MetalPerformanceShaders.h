// What torch's MPSStream.h names of MetalPerformanceShaders, declared by hand.
#pragma once

#import <Metal/Metal.h>

@interface MPSCommandBuffer : NSObject <MTLCommandBuffer>
@end
