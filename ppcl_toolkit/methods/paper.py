"""The preset `paper`: the last row of Table 2 (arXiv 2511.16156), depth, width and fine-tuning.

1000 steps of fine-tuning with a batch twice as large as depth's 6000 and width's 2000 (Sec. 4.1). Its loss is not
said; reading: the velocity.
"""

from functools import partial

from ppcl_toolkit.methods.table2 import PARALLEL, SOURCE, narrow
from ppcl_toolkit.rules.method import Method, Whole, Widths

METHODS = (
    Method(
        name="paper",
        source=f"{SOURCE}, Table 2",
        rule=partial(narrow, 0.8, True),
        segments=PARALLEL,
        widths=Widths(share=2.0),
        whole=Whole(share=2.0),
    ),
)
