"""`python -m train_demo OUT`: see train.py."""

from train_demo.train import main

main()
