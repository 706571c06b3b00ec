"""An adapter on disk: read, written, described, with the small files of its base."""
