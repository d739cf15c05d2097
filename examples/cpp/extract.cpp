// Keypoints and descriptors of an image with a pipeline exported by `tiepoints export`:
//
//   tiepoints export --detector sobelnet --descriptor desnet --output sobelnet-desnet.onnx
//   extract sobelnet-desnet.onnx photo.ppm 2048 > features.txt
//
// Reads PGM and PPM images (8 bit, binary). Writes one line per keypoint, the strongest first:
// x y scale score, and the descriptor. The center of the first pixel is (0, 0).

#include <onnxruntime_cxx_api.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// Shortest and longest side of an image that a pipeline takes.
constexpr int64_t kLeastSide = 16;
constexpr int64_t kMaxSide = 16384;

// An image as planes of numbers in [0, 1]: gray, or red, green and blue.
struct Image {
  int64_t channels = 0, height = 0, width = 0;
  std::vector<float> values;
};

// The next number of the header, which may contain comments.
int64_t ReadNumber(std::istream& file, const std::string& path) {
  while (file >> std::ws && file.peek() == '#') {
    file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  }
  int64_t number = -1;
  if (!(file >> number) || number < 0) {
    throw std::runtime_error(path + " is damaged: its header ends early");
  }
  return number;
}

Image ReadImage(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("no file " + path);
  std::array<char, 2> kind{};
  file.read(kind.data(), kind.size());
  if (kind[0] != 'P' || (kind[1] != '5' && kind[1] != '6')) {
    throw std::runtime_error(path + " is no binary PGM or PPM file; convert the image to one");
  }
  Image image;
  image.channels = kind[1] == '5' ? 1 : 3;
  image.width = ReadNumber(file, path);
  image.height = ReadNumber(file, path);
  const int64_t white = ReadNumber(file, path);
  if (white < 1 || white > 255) {
    throw std::runtime_error(path + " has more than 8 bits; convert it to 8 bits");
  }
  for (const int64_t side : {image.width, image.height}) {
    if (side < kLeastSide || side > kMaxSide) {
      throw std::runtime_error(path + " has " + std::to_string(image.width) + " x " +
                               std::to_string(image.height) + " pixels; sides must be " +
                               std::to_string(kLeastSide) + " to " + std::to_string(kMaxSide));
    }
  }
  file.get();  // the one blank before the pixels
  const int64_t count = image.width * image.height;
  std::vector<unsigned char> pixels(count * image.channels);
  if (!file.read(reinterpret_cast<char*>(pixels.data()), pixels.size())) {
    throw std::runtime_error(path + " is damaged: it has fewer pixels than its header says");
  }
  image.values.resize(pixels.size());
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < image.channels; ++c) {
      image.values[c * count + i] = pixels[i * image.channels + c] / static_cast<float>(white);
    }
  }
  return image;
}

// Output of a pipeline by name, with the length of its rows.
struct Rows {
  const float* data;
  int64_t count, length;
};

Rows RowsOf(const Ort::Value& value) {
  const std::vector<int64_t> shape = value.GetTensorTypeAndShapeInfo().GetShape();
  return {value.GetTensorData<float>(), shape[0], shape.size() < 2 ? 1 : shape[1]};
}

void Extract(const std::string& graph, Image& image, int64_t max_keypoints) {
  Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "tiepoints");
  // std::basic_string<ORTCHAR_T>, because paths are wide on Windows
  const std::basic_string<ORTCHAR_T> path(graph.begin(), graph.end());
  Ort::Session session(env, path.c_str(), Ort::SessionOptions());
  const size_t outputs = session.GetOutputCount();
  if (session.GetInputCount() != 2 || outputs < 3) {
    throw std::runtime_error(graph + " is no pipeline; write one with: tiepoints export");
  }

  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const std::array<int64_t, 4> shape{1, image.channels, image.height, image.width};
  const std::array<int64_t, 1> one{1};
  std::array<Ort::Value, 2> inputs{
      Ort::Value::CreateTensor<float>(memory, image.values.data(), image.values.size(),
                                      shape.data(), shape.size()),
      Ort::Value::CreateTensor<int64_t>(memory, &max_keypoints, 1, one.data(), one.size())};
  const std::array<const char*, 2> input_names{"image", "max_keypoints"};
  const std::array<const char*, 4> output_names{"keypoints", "scales", "scores", "descriptors"};
  const std::vector<Ort::Value> found =
      session.Run(Ort::RunOptions(), input_names.data(), inputs.data(), inputs.size(),
                  output_names.data(), outputs);

  const Rows keypoints = RowsOf(found[0]), scales = RowsOf(found[1]), scores = RowsOf(found[2]);
  const Rows descriptors = outputs > 3 ? RowsOf(found[3]) : Rows{nullptr, 0, 0};
  for (int64_t i = 0; i < keypoints.count; ++i) {
    std::printf("%.4f %.4f %.4f %.6g", keypoints.data[2 * i], keypoints.data[2 * i + 1],
                scales.data[i], scores.data[i]);
    for (int64_t k = 0; k < descriptors.length; ++k) {
      std::printf(" %.5f", descriptors.data[i * descriptors.length + k]);
    }
    std::printf("\n");
  }
  std::fprintf(stderr, "%lld keypoints\n", static_cast<long long>(keypoints.count));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3 && argc != 4) {
    std::fprintf(stderr, "usage: %s PIPELINE.onnx IMAGE.ppm [MAX_KEYPOINTS]\n", argv[0]);
    return 2;
  }
  try {
    const long long count = argc == 4 ? std::atoll(argv[3]) : 2048;
    if (count < 1) throw std::runtime_error("MAX_KEYPOINTS must be at least 1");
    Image image = ReadImage(argv[2]);
    Extract(argv[1], image, count);
  } catch (const std::exception& error) {  // Ort::Exception is one
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
  return 0;
}
