"""What the door `sample` is made of: requests, the PNG files that they become, and conversations."""
