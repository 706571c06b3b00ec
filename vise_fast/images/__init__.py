"""A folder of pictures to uint8 tensors on the model's grid; views and ghosts of them."""
