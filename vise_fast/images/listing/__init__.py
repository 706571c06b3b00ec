"""Which pictures an album holds: found, named, looked at by their headers, split into a held-out
share and the rest. A million of them take no list of a million objects.
"""
