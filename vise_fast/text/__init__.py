"""What is asked, how answers are read, and the ids in between."""
