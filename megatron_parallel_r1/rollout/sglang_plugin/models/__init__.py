"""A model package for `SGLANG_EXTERNAL_MODEL_PACKAGE`: SGLang's own classes of the supported architectures.

SGLang imports all of its 250 model files when a server starts, unless a package has the checkpoint's
architecture; for any other architecture it still imports them.
"""
