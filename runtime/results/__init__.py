"""What is made of labels: islands removed, signs of trouble, the picture, files on disk."""
