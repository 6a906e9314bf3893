"""What the door `plan` is made of: the compiled step, how its text is read, the prediction, and the report."""
