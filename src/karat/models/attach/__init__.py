"""Operators in any model's attention: found by one run of an example, reached while the module runs.

Whatever a model does to queries and keys, in the end it calls `F.scaled_dot_product_attention` or softmax over scores.
`calls` says what such a call is, `mode` takes it while its module runs, `find` finds the modules, `place` puts
operators there, `example` makes inputs.
"""
