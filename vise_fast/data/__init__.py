"""What lies at a place of pictures: counts, sizes, what cannot be used, what could be left out."""
