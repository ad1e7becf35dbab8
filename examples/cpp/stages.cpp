// Runs a program with exits that fast.export("net", target="stages") wrote, on ONNX Runtime's C API alone.
//
//   stages net ROWS x.bin [y.bin ...]
//
// One file for each input, in the order of program.json: its rows one after the other, in the input's dtype. For each row
// one line comes out: its class, the exit where it left, and how sure that exit was. `Program` is run.py in C++: a stage
// takes the rows that are left; what it gives lies under names in a pool of values; after its decision the rows that stay
// are taken out of every value that a later stage reads.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include <onnxruntime_c_api.h>

struct Json {  // a number, a truth value and null are text
  std::string text;
  std::vector<Json> items;
  std::map<std::string, Json> members;

  const Json& operator[](const char* name) const { return members.at(name); }
  bool null() const { return text == "null"; }
  int64_t number() const { return std::stoll(text); }

  static Json read(std::istream& in) {
    Json found;
    const auto quoted = [&in] {
      std::string s;
      for (in.get(); in.peek() != '"'; s += static_cast<char>(in.get())) {
        if (in.peek() == '\\') in.get();
        if (!in) throw std::runtime_error("program.json ends within a string");
      }
      in.get();
      return s;
    };
    in >> std::ws;
    const char open = static_cast<char>(in.peek());
    if (open == '"') {
      found.text = quoted();
    } else if (open == '{' || open == '[') {
      in.get();
      while ((in >> std::ws).peek() != (open == '{' ? '}' : ']')) {
        if (!in) throw std::runtime_error("program.json ends too early");
        const std::string name = open == '{' ? quoted() : "";
        if (open == '{') (in >> std::ws).get();  // the colon
        (open == '{' ? found.members[name] : found.items.emplace_back()) = read(in);
        if ((in >> std::ws).peek() == ',') in.get();
      }
      in.get();
    } else {
      while (in && std::string(",]} \r\n").find(static_cast<char>(in.peek())) == std::string::npos) {
        found.text += static_cast<char>(in.get());
      }
    }
    return found;
  }
};

const std::map<std::string, std::pair<ONNXTensorElementDataType, size_t>> DTYPES = {  // and bytes of an element
    {"float32", {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 4}}, {"float64", {ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, 8}},
    {"float16", {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, 2}}, {"bfloat16", {ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, 2}},
    {"int64", {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, 8}}, {"int32", {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, 4}},
    {"int16", {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16, 2}}, {"int8", {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, 1}},
    {"uint8", {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, 1}}, {"bool", {ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, 1}}};

struct Tensor {
  std::string dtype;
  std::vector<int64_t> shape;
  std::vector<char> bytes;

  const float* floats() const {
    if (dtype != "float32") throw std::runtime_error("got " + dtype + ", wanted float32");
    return reinterpret_cast<const float*>(bytes.data());
  }
  int64_t sizes(size_t from, size_t to) const {
    return std::accumulate(shape.begin() + from, shape.begin() + to, int64_t{1}, std::multiplies<>());
  }
  // Copies along `axis` the positions `from` of `source` to the positions `to` of this tensor.
  void copy(const Tensor& source, size_t axis, const std::vector<int64_t>& from, const std::vector<int64_t>& to) {
    const size_t step = sizes(axis + 1, shape.size()) * DTYPES.at(dtype).second;
    for (int64_t i = 0; i < sizes(0, axis); ++i) {
      for (size_t k = 0; k < from.size(); ++k) {
        std::memcpy(&bytes[(i * shape[axis] + to[k]) * step], &source.bytes[(i * source.shape[axis] + from[k]) * step], step);
      }
    }
  }
  Tensor resized(size_t axis, int64_t rows) const {  // NaN, or 0 where the dtype has none
    Tensor made{dtype, shape, {}};
    made.shape[axis] = rows;
    made.bytes.resize(made.sizes(0, shape.size()) * DTYPES.at(dtype).second);
    if (dtype == "float32") std::fill_n(reinterpret_cast<float*>(made.bytes.data()), made.bytes.size() / 4, NAN);
    if (dtype == "float64") std::fill_n(reinterpret_cast<double*>(made.bytes.data()), made.bytes.size() / 8, NAN);
    return made;
  }
};

using Tensors = std::map<std::string, Tensor>;

std::vector<int64_t> counting(size_t n) {
  std::vector<int64_t> found(n);
  std::iota(found.begin(), found.end(), 0);
  return found;
}

class Program {
 public:
  Json data;

  explicit Program(const std::string& folder) {
    std::ifstream file(folder + "/program.json");
    if (!file) throw std::runtime_error("cannot read " + folder + "/program.json");
    data = Json::read(file);
    if (data["prediction_axis"].number() != 0) throw std::runtime_error("this driver wants class scores with the rows first");
    if (ort == nullptr) throw std::runtime_error("the library is older than the header that this was built with");
    OrtSessionOptions* options;
    check(ort->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "stages", &env));
    check(ort->CreateSessionOptions(&options));
    for (const Json& name : data["files"].items) {
      check(ort->CreateSession(env, (folder + "/" + name.text).c_str(), options, &sessions[name.text]));
    }
    ort->ReleaseSessionOptions(options);
    check(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
  }

  ~Program() {
    for (const auto& [_, session] : sessions) ort->ReleaseSession(session);
    ort->ReleaseMemoryInfo(memory);
    ort->ReleaseEnv(env);
  }

  // The model's outputs by name, with `exit_index` and `confidence` by row.
  Tensors run(const Tensors& inputs, int64_t count, std::vector<int64_t>& exit_index, std::vector<float>& confidence) {
    Tensors values = inputs, outputs;
    std::vector<int64_t> rows = counting(count);
    exit_index.assign(count, 0);
    confidence.assign(count, 0);
    for (const Json& stage : data["stages"].items) {
      for (auto& [name, value] : call(stage["file"].text, stage["takes"], stage["gives"], values)) values[name] = value;
      const float* sure = values.at("stage_confidence").floats();
      std::vector<int64_t> leave, stay;  // positions among the rows that are left
      for (size_t i = 0; i < rows.size(); ++i) {
        const bool leaves = stage["exit"].null() || sure[i] >= std::stof(stage["threshold"].text);
        (leaves ? leave : stay).push_back(i);
        if (!leaves) continue;
        exit_index[rows[i]] = stage["exit"].null() ? data["end"].number() : stage["exit"].number();
        confidence[rows[i]] = std::isnan(sure[i]) ? 0 : sure[i];
      }
      write(outputs, data["prediction"].text, values.at("stage_prediction"), 0, leave, at(rows, leave), count);
      for (const Json& leaf : stage["leaves"].items) {
        const Tensor& value = values.at(leaf["value"].text);
        if (leaf["batch_axis"].null()) {
          outputs[leaf["output"].text] = value;
        } else {
          write(outputs, leaf["output"].text, value, leaf["batch_axis"].number(), counting(rows.size()), rows, count);
        }
      }
      if (stay.empty()) break;
      Tensors live;
      for (const Json& v : stage["live"].items) {
        const Tensor& value = values.at(v["name"].text);
        if (v["batch_axis"].null()) {
          live[v["name"].text] = value;
        } else {
          const int64_t axis = v["batch_axis"].number();
          Tensor taken = value.resized(axis, stay.size());
          taken.copy(value, axis, stay, counting(stay.size()));
          live[v["name"].text] = std::move(taken);
        }
      }
      values = std::move(live);
      rows = at(rows, stay);
    }
    if (const Json& tail = data["tail"]; !tail.null()) {  // what the model computes from its class scores
      Tensors given = inputs;
      given["scores"] = outputs.at(data["prediction"].text);
      for (auto& [name, value] : call(tail["file"].text, tail["takes"], tail["gives"], given)) outputs[name] = value;
    }
    return outputs;
  }

 private:
  const OrtApi* ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  OrtEnv* env = nullptr;
  OrtMemoryInfo* memory = nullptr;
  std::map<std::string, OrtSession*> sessions;

  void check(OrtStatus* status) const {
    if (status == nullptr) return;
    const std::string message = ort->GetErrorMessage(status);
    ort->ReleaseStatus(status);
    throw std::runtime_error(message);
  }

  static std::vector<int64_t> at(const std::vector<int64_t>& rows, const std::vector<int64_t>& places) {
    std::vector<int64_t> found;
    for (const int64_t i : places) found.push_back(rows[i]);
    return found;
  }

  static void write(Tensors& outputs, const std::string& name, const Tensor& value, size_t axis,
                    const std::vector<int64_t>& from, const std::vector<int64_t>& to, int64_t count) {
    if (!outputs.count(name)) outputs[name] = value.resized(axis, count);
    outputs[name].copy(value, axis, from, to);
  }

  Tensors call(const std::string& file, const Json& takes, const Json& gives, Tensors& values) const {
    std::vector<const char*> in, out;
    std::vector<OrtValue*> given, got(gives.items.size());
    for (const Json& name : takes.items) {
      Tensor& t = values.at(name.text);
      in.push_back(name.text.c_str());
      check(ort->CreateTensorWithDataAsOrtValue(memory, t.bytes.data(), t.bytes.size(), t.shape.data(), t.shape.size(),
                                                DTYPES.at(t.dtype).first, &given.emplace_back()));
    }
    for (const Json& name : gives.items) out.push_back(name.text.c_str());
    check(ort->Run(sessions.at(file), nullptr, in.data(), given.data(), in.size(), out.data(), out.size(), got.data()));
    Tensors found;
    for (size_t i = 0; i < got.size(); ++i) {
      OrtTensorTypeAndShapeInfo* info;
      ONNXTensorElementDataType type;
      size_t rank;
      void* memory_of;
      check(ort->GetTensorTypeAndShape(got[i], &info));
      check(ort->GetTensorElementType(info, &type));
      check(ort->GetDimensionsCount(info, &rank));
      Tensor t;
      t.shape.resize(rank);
      check(ort->GetDimensions(info, t.shape.data(), rank));
      ort->ReleaseTensorTypeAndShapeInfo(info);
      t.dtype = std::find_if(DTYPES.begin(), DTYPES.end(), [type](const auto& d) { return d.second.first == type; })->first;
      check(ort->GetTensorMutableData(got[i], &memory_of));
      const char* begin = static_cast<const char*>(memory_of);
      t.bytes.assign(begin, begin + t.sizes(0, rank) * DTYPES.at(t.dtype).second);
      found[out[i]] = std::move(t);
    }
    for (OrtValue* value : given) ort->ReleaseValue(value);
    for (OrtValue* value : got) ort->ReleaseValue(value);
    return found;
  }
};

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: stages FOLDER ROWS FILE [FILE ...]\n";
    return 2;
  }
  try {
    Program program(argv[1]);
    const int64_t count = std::stoll(argv[2]);
    if (count < 1) throw std::runtime_error(std::string("got ") + argv[2] + " rows, wanted 1 or more");
    const std::vector<Json>& wanted = program.data["inputs"].items;
    if (wanted.size() != static_cast<size_t>(argc - 3)) {
      throw std::runtime_error("got " + std::to_string(argc - 3) + " files, wanted " + std::to_string(wanted.size()));
    }
    Tensors inputs;
    for (size_t i = 0; i < wanted.size(); ++i) {
      std::ifstream file(argv[3 + i], std::ios::binary);
      if (!file) throw std::runtime_error(std::string("cannot read ") + argv[3 + i]);
      Tensor t{wanted[i]["dtype"].text, {}, {std::istreambuf_iterator<char>(file), {}}};
      for (const Json& size : wanted[i]["shape"].items) {  // a name in place of a size: as many as the file has
        t.shape.push_back(size.text == "batch" ? count : std::isdigit(size.text[0]) ? size.number() : -1);
      }
      const int64_t known = std::abs(t.sizes(0, t.shape.size())) * static_cast<int64_t>(DTYPES.at(t.dtype).second);
      std::replace(t.shape.begin(), t.shape.end(), int64_t{-1}, static_cast<int64_t>(t.bytes.size()) / known);
      if (t.sizes(0, t.shape.size()) * DTYPES.at(t.dtype).second != t.bytes.size()) {
        throw std::runtime_error(wanted[i]["name"].text + ": " + argv[3 + i] + " has another size");
      }
      inputs[wanted[i]["name"].text] = std::move(t);
    }
    std::vector<int64_t> exits;
    std::vector<float> sure;
    const Tensors outputs = program.run(inputs, count, exits, sure);
    const Tensor& scores = outputs.at(program.data["prediction"].text);
    const int64_t classes = scores.sizes(1, scores.shape.size());
    for (int64_t row = 0; row < count; ++row) {
      const float* begin = scores.floats() + row * classes;
      std::cout << std::max_element(begin, begin + classes) - begin << " " << exits[row] << " " << sure[row] << "\n";
    }
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
