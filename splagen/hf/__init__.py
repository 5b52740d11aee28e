"""SPLA in models of transformers: importing this registers the attention implementation "splagen".

The only part of splagen that imports transformers: `pip install -e '.[hf]'`.
"""

from splagen.hf.attention import register
from splagen.hf.cache import SplagenCache
from splagen.hf.convert import attach, convert, from_pretrained, spec_for

__all__ = ["SplagenCache", "attach", "convert", "from_pretrained", "register", "spec_for"]

register()
