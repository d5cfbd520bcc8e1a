// Expansion for any processor.
#include "sparse_product.h"

namespace jaxcompress {

const ExpandKernel kPortableExpand = {expand_rows<PlainLanes<8>>, sparse_product<PlainLanes<8>>};

}  // namespace jaxcompress
