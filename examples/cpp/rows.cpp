// Runs a program with exits that fast.export("net.pt2", target="aoti") wrote, without Python.
//
//   rows net.pt2 rows.bin 1 28 28
//
// rows.bin holds float32 rows one after the other, each of the sizes that follow its name. For each row one line comes
// out: its class, the exit where it left, and how sure that exit was. One input of floats, and one output of class scores.

#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: rows PACKAGE FILE SIZE [SIZE ...]\n";
    return 2;
  }
  std::vector<int64_t> shape{-1};  // as many rows as the file has
  for (int i = 3; i < argc; ++i) shape.push_back(std::stoll(argv[i]));
  std::ifstream file(argv[2], std::ios::binary);
  if (!file) {
    std::cerr << "cannot read " << argv[2] << "\n";
    return 1;
  }
  std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
  try {
    const auto count = static_cast<int64_t>(bytes.size() / sizeof(float));
    const torch::Tensor x = torch::from_blob(bytes.data(), {count}, torch::kFloat32).view(shape);
    torch::inductor::AOTIModelPackageLoader program(argv[1]);
    const c10::InferenceMode no_gradients;
    const std::vector<torch::Tensor> found = program.run({x});
    const torch::Tensor label = found.at(0).argmax(-1), exit = found.at(1), sure = found.at(2);
    for (int64_t row = 0; row < x.size(0); ++row) {
      std::cout << label[row].item<int64_t>() << " " << exit[row].item<int64_t>() << " " << sure[row].item<float>() << "\n";
    }
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
