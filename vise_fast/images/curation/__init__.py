"""Which pictures are not worth training on, told without a label: small, blurred, flat, or almost
another one.
"""
